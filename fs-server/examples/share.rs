//! Mounts a directory of this host on another one, through the server.
//! `cargo run -p sm-fs-server --example share --features dev-fuse -- SOURCE TARGET [ro]`, as
//! root; it serves until its standard input ends.

use std::error::Error;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use sm_fs_server::dev_fuse::DevFuse;
use sm_fs_server::{FsConfig, Server, Share, ShareOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, target, rest @ ..] = arguments.as_slice() else {
        return Err("usage: share SOURCE TARGET [ro]".into());
    };
    let server = server(Path::new(source), rest.iter().any(|word| word == "ro"))?;
    let mounted = DevFuse::mount(server, target)?;
    println!("{source} is {target}/share until the end of standard input");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    let counts = mounted.unmount()?.counts();
    println!("{} files were open", counts.handles);
    Ok(())
}

/// A server of one directory, named `share`.
fn server(source: &Path, read_only: bool) -> Result<Server, Box<dyn Error>> {
    let options = ShareOptions::default().read_only(read_only);
    let share = Share::new("share", File::open(source)?.into(), options)?;
    Ok(Server::new(FsConfig::default().share(share))?)
}

#[cfg(test)]
mod tests {
    use super::server;

    #[test]
    fn a_directory_is_shared() {
        let folder = tempfile::tempdir().unwrap();
        let server = server(folder.path(), true).unwrap();
        assert!(!server.is_empty());
        assert!(!server.is_mounted());
    }
}
