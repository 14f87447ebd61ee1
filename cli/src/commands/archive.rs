//! Images in archives: `sm save`, `sm load`, `sm import`.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal as _, Read, Write};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use sm_runtime::Sm;
use sm_runtime::image::{Config, Progress, PullOptions};

pub(super) mod change;

use crate::args::{ImportArgs, LoadArgs, SaveArgs};
use crate::failure::Failure;
use crate::printer::Printer;
use crate::progress::Bars;

pub(crate) fn save(sm: &Sm, args: &SaveArgs, printer: &Printer) -> Result<u32, Failure> {
    let bars = Bars::new(printer, args.output.is_some(), "Reading");
    let report = |progress: Progress<'_>| bars.show(progress);
    let options = PullOptions::new().report(&report);
    // Names are looked up first: a wrong one must not create or replace a file.
    for query in &args.images {
        sm.images().inspect(query)?;
    }
    let Some(path) = &args.output else {
        check_standard_output(" with --output")?;
        return to_standard_output(|out| {
            let mut out = BufWriter::with_capacity(1 << 20, out);
            let saved = sm.images().save(&args.images, &mut out, &options);
            bars.clear();
            saved?;
            Ok(out.flush().context("cannot write the archive")?)
        });
    };
    let cannot = || format!("cannot write {path:?}");
    match destination(path).with_context(cannot)? {
        Destination::Stream => {
            let file = File::options()
                .write(true)
                .open(path)
                .with_context(cannot)?;
            let mut out = BufWriter::with_capacity(1 << 20, file);
            sm.images().save(&args.images, &mut out, &options)?;
            out.flush().with_context(cannot)?;
        }
        Destination::File(path) => {
            let file = new_file(&path).with_context(cannot)?;
            let mut out = BufWriter::with_capacity(1 << 20, file);
            sm.images().save(&args.images, &mut out, &options)?;
            out.flush().with_context(cannot)?;
            let file = out.into_inner().with_context(cannot)?;
            file.persist(path).with_context(cannot)?;
        }
    }
    Ok(0)
}

/// Refuses to write an archive to a terminal; `how` tells how a file is named instead.
pub(super) fn check_standard_output(how: &str) -> anyhow::Result<()> {
    if io::stdout().is_terminal() {
        bail!("an archive is not for a terminal: name a file{how}, or redirect standard output");
    }
    Ok(())
}

/// Status of a program that writes to a pipe without a reader, and that SIGPIPE ends.
const READER_IS_GONE: u32 = 128 + 13;

/// Writes an archive to standard output. If its reader is gone before the end, no error is
/// reported, as by other programs in a pipeline, but the status is that of SIGPIPE.
pub(super) fn to_standard_output(
    write: impl FnOnce(&mut dyn Write) -> Result<(), Failure>,
) -> Result<u32, Failure> {
    to_pipe(&mut io::stdout().lock(), write)
}

fn to_pipe(
    out: &mut dyn Write,
    write: impl FnOnce(&mut dyn Write) -> Result<(), Failure>,
) -> Result<u32, Failure> {
    let mut pipe = Pipe { out, broken: false };
    let written = write(&mut pipe);
    if pipe.broken {
        return Ok(READER_IS_GONE);
    }
    written.map(|()| 0)
}

/// A stream that notes whether its reader is gone.
struct Pipe<'a> {
    out: &'a mut dyn Write,
    broken: bool,
}

impl Pipe<'_> {
    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
        self.broken |= result.as_ref().is_err_and(is_gone);
        result
    }
}

impl Write for Pipe<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes);
        self.note(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.out.flush();
        self.note(flushed)
    }
}

/// Creates a file beside `path`, which replaces that only when the archive is complete.
pub(super) fn new_file(path: &Path) -> io::Result<tempfile::NamedTempFile> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => ".".as_ref(),
    };
    // The usual mode of a new file, not the private mode of temporary files.
    let permissions = std::fs::Permissions::from_mode(0o666);
    tempfile::Builder::new()
        .permissions(permissions)
        .tempfile_in(directory)
}

/// The destination of a path for output.
#[derive(Debug, PartialEq)]
pub(super) enum Destination {
    /// A regular file or a free name, after following symbolic links.
    File(PathBuf),
    /// A pipe.
    Stream,
}

/// Resolves the destination `path`. Devices are refused, as by Docker.
pub(super) fn destination(path: &Path) -> io::Result<Destination> {
    let refuse = |what: &str| {
        let text = format!("it is {what}: name a file, or redirect standard output");
        Err(io::Error::other(text))
    };
    match std::fs::metadata(path) {
        Ok(found) if found.is_file() => Ok(Destination::File(path.canonicalize()?)),
        Ok(found) if found.file_type().is_fifo() => Ok(Destination::Stream),
        Ok(found) if found.is_dir() => refuse("a directory"),
        Ok(found) if found.file_type().is_socket() => refuse("a socket"),
        Ok(_) => refuse("a device"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(Destination::File(end_of_links(path)?))
        }
        Err(error) => Err(error),
    }
}

/// Returns the path of the missing file to which the symbolic link `path` leads.
fn end_of_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    // The limit of Linux (path_resolution(7)).
    for _ in 0..40 {
        match std::fs::read_link(&path) {
            Ok(link) => path = path.parent().unwrap_or(Path::new("")).join(link),
            Err(_) => return Ok(path),
        }
    }
    Err(rustix::io::Errno::LOOP.into())
}

pub(crate) fn load(sm: &Sm, args: &LoadArgs, printer: &Printer) -> Result<u32, Failure> {
    let quiet = args.quiet || args.json;
    let bars = Bars::new(printer, !quiet, "Reading");
    let report = |progress: Progress<'_>| bars.show(progress);
    let options = PullOptions::new()
        .platform(args.platform.clone())
        .report(&report);
    let loaded = match &args.input {
        Some(path) => sm.images().load_file(path, &options),
        None if io::stdin().is_terminal() => {
            return Err(anyhow!(
                "standard input is a terminal: name a file with --input, or redirect standard input"
            )
            .into());
        }
        None => sm
            .images()
            .load(io::stdin().lock(), "standard input", &options),
    };
    bars.clear();
    let loaded = loaded?;
    if args.json {
        printer.json(&loaded)?;
        return Ok(0);
    }
    for image in loaded {
        match args.quiet {
            true => printer.line(image.digest),
            // The format of Docker.
            false => image
                .names
                .iter()
                .for_each(|name| printer.line(format_args!("Loaded image: {name}"))),
        }
    }
    Ok(0)
}

pub(crate) fn import(sm: &Sm, args: &ImportArgs, printer: &Printer) -> Result<u32, Failure> {
    let mut config = Config::default();
    change::apply(&args.change, &mut config)?;
    let bars = Bars::new(printer, false, "Reading");
    let report = |progress: Progress<'_>| bars.show(progress);
    let options = PullOptions::new()
        .platform(args.platform.clone())
        .report(&report);
    let stream: Box<dyn Read + Send> = if args.file.as_os_str() == "-" {
        Box::new(io::stdin())
    } else {
        let path = &args.file;
        Box::new(File::open(path).with_context(|| format!("cannot read {path:?}"))?)
    };
    let name = args.name.as_deref();
    let imported = sm
        .images()
        .import(stream, name, config, &args.message, &options);
    bars.clear();
    printer.line(imported?);
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A stream that fails after some bytes.
    struct Failing(usize, io::ErrorKind);

    impl Write for Failing {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.0.min(bytes.len()) {
                0 => Err(self.1.into()),
                count => {
                    self.0 -= count;
                    Ok(count)
                }
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_is_gone_is_no_failure_and_no_success() {
        let write = |room, kind| {
            to_pipe(&mut Failing(room, kind), |out| {
                out.write_all(&[0; 100]).context("cannot write it")?;
                Ok(())
            })
        };
        assert_eq!(write(100, io::ErrorKind::BrokenPipe).unwrap(), 0);
        assert_eq!(write(99, io::ErrorKind::BrokenPipe).unwrap(), 141);
        let full = write(99, io::ErrorKind::StorageFull).unwrap_err();
        assert!(full.to_string().contains("cannot write it"), "{full}");
        // A pipe of another origin.
        let other = to_pipe(&mut io::sink(), |_| {
            Err(io::Error::from(io::ErrorKind::BrokenPipe).into())
        });
        assert!(other.is_err());
    }

    #[test]
    fn only_files_are_replaced_and_links_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let at = |name: &str| root.join(name);
        fs::write(at("file"), b"x").unwrap();
        fs::create_dir(at("sub")).unwrap();
        for (link, target) in [
            ("to-file", "file"),
            ("to-nothing", "sub/new"),
            ("to-link", "to-nothing"),
            ("to-null", "/dev/null"),
            ("loop", "loop"),
        ] {
            symlink(target, at(link)).unwrap();
        }
        let _listener = UnixListener::bind(at("socket")).unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&reader);
        let pipe = PathBuf::from(format!("/proc/self/fd/{fd}"));

        for (name, leads_to) in [
            ("file", "file"),
            ("new", "new"),
            ("to-file", "file"),
            ("to-nothing", "sub/new"),
            ("to-link", "sub/new"),
        ] {
            let found = destination(&at(name)).unwrap();
            assert_eq!(found, Destination::File(at(leads_to)), "{name}");
        }
        assert_eq!(destination(&pipe).unwrap(), Destination::Stream);
        for (path, why) in [
            (at("sub"), "a directory"),
            (at("socket"), "a socket"),
            (at("to-null"), "a device"),
            (PathBuf::from("/dev/null"), "a device"),
            (at("loop"), "symbolic links"),
        ] {
            let error = destination(&path).unwrap_err().to_string();
            assert!(error.contains(why), "{path:?}: {error}");
        }
    }
}
