//! Copying between host and VM, by the rules of `docker cp`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use sm_control::session::Stdin;
use sm_guest_proto::files::{FileOperation, PathBytes};
use sm_tar::{ExtractOptions, Extracted, TarWriter, XattrPolicy};

use super::error::{FilesError, of_reader};
use super::{FileStat, FileType, Files, Links};
use crate::{Error, ErrorKind};

/// Size of the buffer of a stream in bytes.
const BUFFER: usize = 64 << 10;

/// Options for copying.
#[derive(Clone, Copy, Debug, Default)]
pub struct CopyOptions {
    owners: bool,
    follow: bool,
}

impl CopyOptions {
    /// Creates options to copy symbolic links as such, to files of root in the VM or of
    /// this user on the host.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Copies owners, groups and extended attributes, which usually requires privileges on
    /// the host. (On the host, only extended attributes of users are set.)
    #[must_use]
    pub fn owners(mut self, owners: bool) -> Self {
        self.owners = owners;
        self
    }

    /// Copies the file that the source leads to, if it is a symbolic link.
    #[must_use]
    pub fn follow(mut self, follow: bool) -> Self {
        self.follow = follow;
        self
    }
}

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Copied {
    /// Size of the contents of files in bytes.
    pub bytes: u64,
}

/// Properties of a path's text (Docker: `assertsDirectory`, `specifiesCurrentDir`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spelling {
    /// It ends in `/` or `/.`, so it has to be a directory.
    is_directory: bool,
    /// It ends in `/.`, so the contents of the directory are meant.
    contents: bool,
}

impl Spelling {
    fn of(path: &[u8]) -> Self {
        let contents = path == b"." || path.ends_with(b"/.");
        Self {
            is_directory: contents || path.ends_with(b"/"),
            contents,
        }
    }
}

/// A destination: a directory, and the name in it; `.` for the contents of the source.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    directory: Vec<u8>,
    name: Vec<u8>,
}

/// Existence and type of a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Existing {
    Nothing,
    Directory,
    Other,
}

/// Chooses directory and name (Docker: `PrepareArchiveCopy`).
fn target(
    source: (&[u8], bool),
    destination: &[u8],
    existing: Existing,
) -> Result<Target, FilesError> {
    let (source, is_directory) = source;
    let shown = || String::from_utf8_lossy(destination).into_owned();
    match existing {
        Existing::Directory => {
            let name = match Spelling::of(source).contents {
                true => b"."[..].to_vec(),
                // The root has no name.
                false => base(source).unwrap_or(b".").to_vec(),
            };
            Ok(Target {
                directory: destination.to_vec(),
                name,
            })
        }
        Existing::Other if is_directory => Err(FilesError::DirectoryToFile(shown())),
        Existing::Other if Spelling::of(destination).is_directory => {
            Err(FilesError::NotADirectory(shown()))
        }
        Existing::Nothing if !is_directory && Spelling::of(destination).is_directory => {
            Err(FilesError::NoDirectory(shown()))
        }
        Existing::Nothing | Existing::Other => {
            let trimmed = trim(destination);
            let name = base(trimmed).ok_or_else(|| FilesError::NoDirectory(shown()))?;
            let directory = match trimmed.len() - name.len() {
                0 => b"."[..].to_vec(),
                end => trimmed.get(..end).unwrap_or_default().to_vec(),
            };
            Ok(Target {
                directory,
                name: name.to_vec(),
            })
        }
    }
}

/// Removes slashes and `/.` at the end.
fn trim(path: &[u8]) -> &[u8] {
    let mut rest = path;
    loop {
        rest = match rest {
            [start @ .., b'/', b'.'] | [start @ .., b'/'] if !start.is_empty() => start,
            rest => return rest,
        }
    }
}

/// Returns the last name of a path; `None` for the root, `.` and `..`.
fn base(path: &[u8]) -> Option<&[u8]> {
    let name = trim(path).rsplit(|byte| *byte == b'/').next()?;
    (!matches!(name, b"" | b"." | b"..")).then_some(name)
}

fn local(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FilesError {
    move |source| FilesError::Local {
        operation,
        path: path.to_owned(),
        source,
    }
}

impl Files {
    // ---- from the VM ----

    /// Describes the source of a copy.
    fn source(&self, path: &[u8], follow: bool) -> Result<FileStat, Error> {
        let spelling = Spelling::of(path);
        let stat = self.stat(path, links(follow || spelling.is_directory))?;
        if spelling.is_directory && stat.kind != FileType::Directory {
            let shown = String::from_utf8_lossy(path).into_owned();
            return Err(FilesError::NotADirectory(shown).into());
        }
        Ok(stat)
    }

    /// Copies a file or directory of the VM to the host, like `docker cp`: into an existing
    /// directory, or to the path `destination`, whose directory must exist. With a source
    /// that ends in `/.`, the contents of the directory are copied.
    ///
    /// The guest is not trusted: no file is created outside the destination, and, unless
    /// contents are copied, only a file or directory of the expected name.
    ///
    /// # Errors
    /// Source or destination cannot be used, or the guest's archive is refused.
    pub fn copy_out(
        &self,
        source: impl AsRef<[u8]>,
        destination: &Path,
        options: &CopyOptions,
    ) -> Result<Copied, Error> {
        let source = source.as_ref();
        let stat = self.source(source, options.follow)?;
        let is_directory = stat.kind == FileType::Directory;
        let (destination, existing) = existing_local(destination)?;
        let path = destination.as_os_str().as_bytes();
        let target = target((source, is_directory), path, existing)?;
        let directory = Path::new(OsStr::from_bytes(&target.directory));
        let into = File::open(directory).map_err(local("open directory", directory))?;
        let mut extract = ExtractOptions::new().owners(options.owners);
        if options.owners {
            extract = extract.xattrs(XattrPolicy::User);
        }
        if target.name != b"." {
            extract = extract.only(target.name.clone(), is_directory);
        }
        let follow = options.follow || Spelling::of(source).is_directory;
        let stream = self.pack(source, &target.name, links(follow))?;
        let mut stream = BufReader::with_capacity(BUFFER, stream);
        let Extracted { bytes, .. } = extract
            .extract(&mut stream, into.as_fd())
            .map_err(of_extraction)?;
        // The guest may report a failure after the end of the archive.
        stream.into_inner().finish()?;
        Ok(Copied { bytes })
    }

    /// Reads a file or directory of the VM as a tar archive, in which it has its own name,
    /// as `docker cp VM:PATH -`.
    ///
    /// # Errors
    /// There is no such file, or the VM is not running.
    pub fn copy_archive_out(
        &self,
        source: impl AsRef<[u8]>,
        options: &CopyOptions,
    ) -> Result<super::GuestReader, Error> {
        let source = source.as_ref();
        self.source(source, options.follow)?;
        let spelling = Spelling::of(source);
        let name = match spelling.contents {
            true => b".",
            false => base(source).unwrap_or(b"."),
        };
        self.pack(source, name, links(options.follow || spelling.is_directory))
    }

    // ---- to the VM ----

    /// Copies a file or directory of the host to the VM, by the same rules as
    /// [`Self::copy_out`].
    ///
    /// # Errors
    /// Source or destination cannot be used.
    pub fn copy_in(
        &self,
        source: &Path,
        destination: impl AsRef<[u8]>,
        options: &CopyOptions,
    ) -> Result<Copied, Error> {
        let spelled = source.as_os_str().as_bytes();
        let follow = options.follow || Spelling::of(spelled).is_directory;
        let found = match follow {
            true => fs::metadata(source),
            false => fs::symlink_metadata(source),
        };
        let found = found.map_err(local("read", source))?;
        let (destination, existing) = self.existing(destination.as_ref())?;
        let target = target((spelled, found.is_dir()), &destination, existing)?;
        let real = match follow {
            true => source.canonicalize().map_err(local("read", source))?,
            false => PathBuf::from(OsStr::from_bytes(trim(spelled))),
        };
        let operation = FileOperation::Unpack {
            path: PathBytes(target.directory),
            owners: options.owners,
        };
        let reader = self.start(operation)?;
        let input = Stdin::new(reader.writer());
        let mut writer = TarWriter::new(Counting {
            out: BufWriter::with_capacity(BUFFER, input),
            bytes: 0,
        });
        let written = writer
            .append_tree(&real, &target.name, &|_| false)
            .and_then(|()| writer.finish());
        match written {
            Ok(counting) => {
                let bytes = counting.bytes;
                drop(counting);
                reader.finish()?;
                Ok(Copied { bytes })
            }
            // The guest does not take more because the operation has failed there.
            Err(error)
                if error
                    .get_ref()
                    .is_some_and(|inner| inner.is::<FilesError>()) =>
            {
                reader.finish()?;
                Err(of_reader(error).into())
            }
            // Without the end of the input, the guest does not take a part for the whole.
            Err(error) => Err(local("read", source)(error).into()),
        }
    }

    /// Extracts a tar archive in a directory of the VM, as `docker cp - VM:PATH`.
    ///
    /// # Errors
    /// The destination is no directory, an entry is refused, `archive` cannot be read, or
    /// the VM is not running.
    pub fn copy_archive_in(
        &self,
        archive: impl Read,
        destination: impl AsRef<[u8]>,
        options: &CopyOptions,
    ) -> Result<(), Error> {
        let destination = destination.as_ref();
        let shown = || String::from_utf8_lossy(destination).into_owned();
        match self.existing(destination)?.1 {
            Existing::Directory => self.unpack(destination, archive, options.owners),
            Existing::Nothing => Err(FilesError::NoDirectory(shown()).into()),
            Existing::Other => Err(FilesError::NotADirectory(shown()).into()),
        }
    }

    /// Returns the destination without links, if it exists.
    fn existing(&self, path: &[u8]) -> Result<(Vec<u8>, Existing), Error> {
        match self.stat(path, Links::Follow) {
            Ok(stat) if stat.kind == FileType::Directory => {
                Ok((path.to_vec(), Existing::Directory))
            }
            Ok(_) if Spelling::of(path).is_directory => {
                let shown = String::from_utf8_lossy(path).into_owned();
                Err(FilesError::NotADirectory(shown).into())
            }
            Ok(stat) => Ok((stat.path.0, Existing::Other)),
            Err(error) if error.kind() == ErrorKind::NotFound && is_of_guest(&error) => {
                Ok((path.to_vec(), Existing::Nothing))
            }
            Err(error) => Err(error),
        }
    }
}

fn is_of_guest(error: &Error) -> bool {
    matches!(error, Error::Files(FilesError::Guest { .. }))
}

fn links(follow: bool) -> Links {
    match follow {
        true => Links::Follow,
        false => Links::Keep,
    }
}

/// Returns the destination without links, if it exists.
fn existing_local(path: &Path) -> Result<(PathBuf, Existing), FilesError> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => Ok((path.to_owned(), Existing::Directory)),
        Ok(_) => {
            let real = path.canonicalize().map_err(local("use", path))?;
            Ok((real, Existing::Other))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok((path.to_owned(), Existing::Nothing))
        }
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            Err(FilesError::NotADirectory(path.display().to_string()))
        }
        Err(error) => Err(local("use", path)(error)),
    }
}

/// Returns the failure of the guest or the connection that has ended an extraction.
fn of_extraction(error: sm_tar::ExtractionError) -> FilesError {
    match error {
        sm_tar::ExtractionError::Archive(sm_tar::TarError {
            reason: sm_tar::TarReason::Io(error),
            ..
        }) => of_reader(error),
        error => FilesError::Extract(error),
    }
}

fn unsent(error: io::Error) -> io::Error {
    FilesError::Connection(error).into()
}

/// Counts the bytes of an archive, and marks failures of sending it.
#[derive(Debug)]
struct Counting<W> {
    out: W,
    bytes: u64,
}

impl<W: io::Write> io::Write for Counting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes).map_err(unsent)?;
        let more = u64::try_from(count).unwrap_or(u64::MAX);
        self.bytes = self.bytes.saturating_add(more);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush().map_err(unsent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(
        source: (&str, bool),
        destination: &str,
        existing: Existing,
    ) -> Result<(String, String), String> {
        let source = (source.0.as_bytes(), source.1);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        target(source, destination.as_bytes(), existing)
            .map(|target| (text(target.directory), text(target.name)))
            .map_err(|error| error.to_string())
    }

    /// The table in the documentation of `docker cp`.
    #[test]
    fn destinations_follow_dockers_rules() {
        use Existing::{Directory, Nothing, Other};
        let is = |directory: &str, name: &str| Ok((directory.to_owned(), name.to_owned()));
        for (source, destination, existing, expected) in [
            (("/a/f", false), "/x/new", Nothing, is("/x/", "new")),
            (("/a/f", false), "new", Nothing, is(".", "new")),
            (("/a/f", false), "/x/old", Other, is("/x/", "old")),
            (("/a/f", false), "/x", Directory, is("/x", "f")),
            (("/a/f", false), "/x/", Directory, is("/x/", "f")),
            (("/a/d", true), "/x/new", Nothing, is("/x/", "new")),
            (("/a/d", true), "/x/new/", Nothing, is("/x/", "new")),
            (("/a/d", true), "/x", Directory, is("/x", "d")),
            (("/a/d/", true), "/x", Directory, is("/x", "d")),
            (("/a/d/.", true), "/x", Directory, is("/x", ".")),
            (("/a/d/.", true), "/x/new", Nothing, is("/x/", "new")),
            ((".", true), "/x", Directory, is("/x", ".")),
            (("/", true), "/x", Directory, is("/x", ".")),
            (("..", true), "/x", Directory, is("/x", ".")),
        ] {
            let chosen = choose(source, destination, existing);
            assert_eq!(chosen, expected, "{source:?} {destination}");
        }
        for (source, destination, existing, expected) in [
            (
                ("/a/f", false),
                "/x/new/",
                Nothing,
                "the destination directory \"/x/new/\" does not exist",
            ),
            (
                ("/a/d", true),
                "/x/old",
                Other,
                "cannot copy a directory to the file \"/x/old\"",
            ),
            (
                ("/a/f", false),
                "/x/old/",
                Other,
                "\"/x/old/\" is not a directory",
            ),
        ] {
            let refused = choose(source, destination, existing).unwrap_err();
            assert_eq!(refused, expected);
        }
    }

    #[test]
    fn paths_are_trimmed_to_their_names() {
        for (path, trimmed, name) in [
            ("/a/b/", "/a/b", Some("b")),
            ("/a/b/.", "/a/b", Some("b")),
            ("/a//./", "/a", Some("a")),
            ("/", "/", None),
            ("/.", "/.", None),
            (".", ".", None),
            ("a/..", "a/..", None),
            ("a", "a", Some("a")),
        ] {
            assert_eq!(trim(path.as_bytes()), trimmed.as_bytes(), "{path}");
            assert_eq!(base(path.as_bytes()), name.map(str::as_bytes), "{path}");
        }
    }
}
