//! Paths of unix sockets: bound without a race, and unlinked at the end.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, RenameFlags, fstat, lstat, open, renameat_with};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::Error;

/// An open file, independent of its name. While the descriptor is open, no other file
/// gets its inode number, so that a name can be compared with it.
#[derive(Debug)]
struct OpenFile(OwnedFd);

impl OpenFile {
    fn of(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(open(path, flags, Mode::empty())?))
    }

    fn is_at(&self, path: &Path) -> bool {
        let (Ok(file), Ok(there)) = (fstat(&self.0), lstat(path)) else {
            return false;
        };
        (file.st_dev, file.st_ino) == (there.st_dev, there.st_ino)
    }
}

/// The path of a listening socket. Dropping it unlinks the socket, unless the path names
/// another file by now.
#[derive(Debug)]
pub(crate) struct SocketPath {
    path: PathBuf,
    socket: OpenFile,
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        if self.socket.is_at(&self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on `path`. The socket appears there with mode 0600 and already listening: it
/// is bound inside a directory that only this user can enter and then renamed, so that
/// others cannot connect at any moment. A socket of this user without a listener is
/// replaced; any other file is left alone.
///
/// # Errors
/// The path is in use, or a system call failed.
pub(crate) fn listen(
    frontend: &'static str,
    path: &Path,
) -> Result<(UnixListener, SocketPath), Error> {
    let requested = RequestedPath { frontend, path };
    let stale = requested.stale_socket()?;
    let new_socket = bind_private(path).map_err(|error| requested.failed("listen on")(error))?;
    requested.rename_into_place(&new_socket, stale)?;
    let socket_path = SocketPath {
        path: path.to_owned(),
        socket: new_socket.socket,
    };
    Ok((new_socket.listener, socket_path))
}

/// A socket that listens in a private directory.
struct PrivateSocket {
    listener: UnixListener,
    socket: OpenFile,
    inside: PathBuf,
    _private: tempfile::TempDir,
}

fn bind_private(path: &Path) -> io::Result<PrivateSocket> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let private = private_directory(parent.unwrap_or(Path::new(".")))?;
    let inside = private.path().join("s");
    let listener = UnixListener::bind(&inside)?;
    listener.set_nonblocking(true)?;
    fs::set_permissions(&inside, fs::Permissions::from_mode(0o600))?;
    let socket = OpenFile::of(&inside)?;
    Ok(PrivateSocket {
        listener,
        socket,
        inside,
        _private: private,
    })
}

/// Creates a directory that only this user can enter, independent of the umask.
fn private_directory(parent: &Path) -> io::Result<tempfile::TempDir> {
    // Short names: a socket's path is limited to 107 bytes.
    tempfile::Builder::new()
        .prefix(".s")
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir_in(parent)
}

pub(crate) fn failed(
    frontend: &'static str,
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io {
        frontend,
        operation,
        path,
        source,
    }
}

/// The path of a new socket, which another file may have.
struct RequestedPath<'a> {
    frontend: &'static str,
    path: &'a Path,
}

impl RequestedPath<'_> {
    fn failed(&self, operation: &'static str) -> impl FnOnce(io::Error) -> Error {
        failed(self.frontend, operation, self.path)
    }

    fn in_use(&self) -> Error {
        Error::InUse {
            frontend: self.frontend,
            path: self.path.to_owned(),
        }
    }

    /// Returns the stale socket at the path, which may be replaced, if there is one. Any
    /// other file there is an error.
    fn stale_socket(&self) -> Result<Option<OpenFile>, Error> {
        let file = match OpenFile::of(self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("look at")(error)),
        };
        let stat = fstat(&file.0).map_err(|error| self.failed("look at")(error.into()))?;
        let (frontend, path) = (self.frontend, self.path.to_owned());
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return Err(Error::NotASocket { frontend, path });
        }
        if stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(Error::OtherUsers { frontend, path });
        }
        match self.try_connect() {
            Err(Errno::CONNREFUSED) => Ok(Some(file)),
            // The socket was removed in the meantime.
            Err(Errno::NOENT) => Ok(None),
            // A listener answers, or has a full backlog (EAGAIN), or is of another socket
            // type (EPROTOTYPE).
            Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(self.in_use()),
            Err(error) => Err(self.failed("connect to")(error.into())),
        }
    }

    /// Connects without waiting for a server whose backlog is full.
    fn try_connect(&self) -> Result<(), Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(self.path)?)
    }

    /// Renames the new socket to the path, which must be free or name `stale`.
    fn rename_into_place(
        &self,
        new_socket: &PrivateSocket,
        stale: Option<OpenFile>,
    ) -> Result<(), Error> {
        let failed = |error: Errno| match error {
            Errno::EXIST => self.in_use(),
            error => self.failed("move a socket to")(error.into()),
        };
        let Some(stale) = stale else {
            return move_to_free(&new_socket.inside, self.path).map_err(failed);
        };
        match renameat_with(
            CWD,
            &new_socket.inside,
            CWD,
            self.path,
            RenameFlags::EXCHANGE,
        ) {
            Ok(()) => {
                // After the exchange, the old file has the temporary name of the new
                // socket.
                if stale.is_at(&new_socket.inside) {
                    return Ok(());
                }
                // Another process has replaced the stale socket first: undo the exchange.
                renameat_with(
                    CWD,
                    &new_socket.inside,
                    CWD,
                    self.path,
                    RenameFlags::EXCHANGE,
                )
                .map_err(failed)?;
                Err(self.in_use())
            }
            // The stale socket was removed in the meantime.
            Err(Errno::NOENT) => move_to_free(&new_socket.inside, self.path).map_err(failed),
            // The file system does not support RENAME_EXCHANGE.
            Err(Errno::INVAL | Errno::NOSYS) => {
                if self.stale_socket()?.is_some() && stale.is_at(self.path) {
                    fs::remove_file(self.path).map_err(self.failed("replace"))?;
                }
                move_to_free(&new_socket.inside, self.path).map_err(failed)
            }
            Err(error) => Err(failed(error)),
        }
    }
}

/// Renames a file to a name that does not exist yet.
fn move_to_free(from: &Path, to: &Path) -> Result<(), Errno> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems without RENAME_NOREPLACE have link(2), which never replaces; the
        // old name is removed with its directory.
        Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::link(from, to),
        moved => moved,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    /// Creates a directory, and returns it with a path in it.
    fn socket_path() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        (directory, path)
    }

    fn refused(path: &Path) -> Error {
        listen("test", path).unwrap_err()
    }

    #[test]
    fn the_socket_is_private_and_unlinked_on_drop() {
        let (directory, path) = socket_path();
        let (_listener, socket_path) = listen("test", &path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        drop(socket_path);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn other_files_than_sockets_are_not_replaced() {
        let (directory, path) = socket_path();
        fs::write(&path, "precious").unwrap();
        let error = refused(&path);
        assert!(matches!(error, Error::NotASocket { .. }), "{error}");
        assert!(error.to_string().contains("not a socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        // Links are not followed.
        let link = directory.path().join("l");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(refused(&link), Error::NotASocket { .. }));
        assert!(matches!(
            refused(directory.path()),
            Error::NotASocket { .. }
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_live_socket_is_not_replaced_and_a_stale_one_is() {
        let (_directory, path) = socket_path();
        drop(UnixListener::bind(&path).unwrap()); // stale: nobody listens
        let (_listener, _place) = listen("test", &path).unwrap();
        UnixStream::connect(&path).unwrap();
        assert!(matches!(refused(&path), Error::InUse { .. }));
        let (_directory, path) = socket_path();
        let _datagrams = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(refused(&path), Error::InUse { .. }));
    }

    #[test]
    fn a_server_that_is_busy_is_not_waited_for() {
        let (_directory, path) = socket_path();
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let requested = RequestedPath {
            frontend: "test",
            path: &path,
        };
        // Cancelled connections fill the backlog as well.
        for _ in 0..100 {
            if requested.try_connect() == Err(Errno::AGAIN) {
                break;
            }
        }
        assert_eq!(requested.try_connect(), Err(Errno::AGAIN));
        assert!(matches!(refused(&path), Error::InUse { .. }));
    }

    #[test]
    fn of_two_servers_the_first_keeps_the_path() {
        let (_directory, path) = socket_path();
        let requested = RequestedPath {
            frontend: "test",
            path: &path,
        };
        // Both servers inspect the path before either of them binds it.
        drop(UnixListener::bind(&path).unwrap());
        for stale in [requested.stale_socket().unwrap(), None] {
            let late = bind_private(&path).unwrap();
            let _ = fs::remove_file(&path);
            let (_listener, _place) = listen("test", &path).unwrap();
            let error = requested.rename_into_place(&late, stale).unwrap_err();
            assert!(matches!(error, Error::InUse { .. }), "{error}");
            UnixStream::connect(&path).unwrap();
        }
    }

    #[test]
    fn a_path_that_names_another_socket_is_not_unlinked() {
        let (_directory, path) = socket_path();
        let (_listener, socket_path) = listen("test", &path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket_path);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn sockets_are_private_with_an_empty_umask() {
        const CHILD: &str = "SM_TEST_UMASK";
        if std::env::var_os(CHILD).is_none() {
            // The umask is per process, so the test runs in a child.
            let name = "socket_path::tests::sockets_are_private_with_an_empty_umask";
            let child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name])
                .env(CHILD, "1")
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&child.stdout).into_owned();
            assert!(
                child.status.success() && said.contains("1 passed"),
                "{said}"
            );
            return;
        }
        rustix::process::umask(rustix::fs::Mode::empty());
        let (directory, path) = socket_path();
        let private = private_directory(directory.path()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(private.path()), 0o700);
        let (_listener, _place) = listen("test", &path).unwrap();
        assert_eq!(mode(&path), 0o600);
    }
}
