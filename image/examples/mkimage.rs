//! Creates an image of a directory or a static binary in an OCI layout: `mkimage [--cmd
//! WORD]... [--env NAME=VALUE]... LAYOUT TAG DIRECTORY|BINARY [ENTRYPOINT...]`. A binary
//! is stored as `/NAME`, and is the entry point unless another one is given.

use std::fs;
use std::path::Path;

use sm_image::{Compression, Config, LayoutBuilder, MemoryFile};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let (mut cmd, mut env) = (Vec::new(), Vec::new());
    while let [option, value, ..] = arguments.as_slice() {
        match option.as_str() {
            "--cmd" => cmd.push(value.clone()),
            "--env" => env.push(value.clone()),
            _ => break,
        }
        arguments.drain(..2);
    }
    let [layout, tag, content, entrypoint @ ..] = arguments.as_slice() else {
        return Err("usage: see the first lines of image/examples/mkimage.rs".into());
    };
    let content = Path::new(content);
    let mut entrypoint = entrypoint.to_vec();
    let mut image = LayoutBuilder::new(Path::new(layout), Compression::Gzip(6))?;
    if content.is_dir() {
        image.directory_layer(content)?;
    } else {
        let name = content.file_name().ok_or("the binary has no name")?;
        let path = format!("/{}", name.display());
        let file = MemoryFile::File(fs::read(content)?);
        image.memory_layer(&[(path.trim_start_matches('/'), 0o755, file)])?;
        if entrypoint.is_empty() {
            entrypoint.push(path);
        }
    }
    let mut config = Config::default();
    if !entrypoint.is_empty() {
        config.entrypoint = Some(entrypoint);
    }
    if !cmd.is_empty() {
        config.cmd = Some(cmd);
    }
    if !env.is_empty() {
        config.env = Some(env);
    }
    println!("{}", image.finish(tag, config)?);
    Ok(())
}
