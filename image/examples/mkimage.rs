//! Makes an image of a directory or a static binary in an OCI layout:
//! `mkimage LAYOUT TAG DIRECTORY|BINARY [ENTRYPOINT...]`. A binary becomes
//! `/NAME`, and the entry point unless another one is given.

use std::fs;
use std::path::Path;

use sm_image::{Compression, Config, LayoutBuilder, MemoryFile};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [layout, tag, content, entrypoint @ ..] = arguments.as_slice() else {
        return Err("usage: mkimage LAYOUT TAG DIRECTORY|BINARY [ENTRYPOINT...]".into());
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
        config.set_entrypoint(Some(entrypoint));
    }
    println!("{}", image.finish(tag, config)?);
    Ok(())
}
