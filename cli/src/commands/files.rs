//! Files of VMs: `sm cp`, `sm diff`, `sm export`, `sm commit`.

use std::io::{self, BufWriter, IsTerminal as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use sm_runtime::commit::CommitOptions;
use sm_runtime::files::{ChangeKind, Copied, CopyOptions, FileAccess, FileScope, Processes};
use sm_runtime::image::{Progress, PullOptions};
use sm_runtime::{OpenFiles, Sm};

use super::archive::{self, Destination, change, destination};
use crate::args::{CommitArgs, CpArgs, DiffArgs, ExportArgs};
use crate::failure::Failure;
use crate::moment;
use crate::printer::Printer;
use crate::progress::Bars;
use crate::units::format_size;

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side<'a> {
    /// A tar archive on a standard stream.
    Stream,
    /// A path of this host.
    Host(&'a Path),
    /// A path of a VM.
    Vm { vm: &'a str, path: &'a str },
}

impl<'a> Side<'a> {
    /// Tells a VM's path from one of the host, as Docker does: a path that begins with `/`
    /// or `.` is of the host, whatever colons it has.
    fn of(text: &'a str) -> Self {
        match text.split_once(':') {
            _ if text == "-" => Self::Stream,
            Some((vm, path)) if !vm.is_empty() && !text.starts_with(['/', '.']) => {
                Self::Vm { vm, path }
            }
            _ => Self::Host(Path::new(text)),
        }
    }
}

pub(crate) fn cp(sm: &Sm, args: &CpArgs, printer: &Printer) -> Result<u32, Failure> {
    let options = CopyOptions::new()
        .owners(args.archive)
        .follow(args.follow_link);
    let copied = match (Side::of(&args.source), Side::of(&args.destination)) {
        (Side::Vm { .. }, Side::Vm { .. }) => {
            return Err(anyhow!("copying between VMs is not supported").into());
        }
        (Side::Vm { vm, path }, Side::Stream) => {
            archive::check_standard_output("")?;
            let files = open(sm, vm, FileScope::Mounts, FileAccess::Read)?;
            let mut from = files.copy_archive_out(guest_path(path), &options)?;
            return archive::to_standard_output(|out| {
                copy_stream(&mut from, out).context("cannot copy the archive")?;
                Ok(files.close()?)
            });
        }
        (Side::Vm { vm, path }, Side::Host(to)) => {
            let files = open(sm, vm, FileScope::Mounts, FileAccess::Read)?;
            let copied = files.copy_out(guest_path(path), to, &options)?;
            files.close()?;
            copied
        }
        (Side::Stream, Side::Vm { vm, path }) => {
            if io::stdin().is_terminal() {
                return Err(anyhow!(
                    "standard input is a terminal: redirect an archive to it, or name a file"
                )
                .into());
            }
            let files = open(sm, vm, FileScope::Mounts, FileAccess::Write)?;
            let input = io::stdin().lock();
            files.copy_archive_in(input, guest_path(path), &options)?;
            files.close()?;
            return Ok(0);
        }
        (Side::Host(from), Side::Vm { vm, path }) => {
            let files = open(sm, vm, FileScope::Mounts, FileAccess::Write)?;
            let copied = files.copy_in(from, guest_path(path), &options)?;
            files.close()?;
            copied
        }
        (Side::Stream | Side::Host(_), Side::Stream | Side::Host(_)) => {
            return Err(anyhow!("one of the two paths has to be that of a VM: VM:PATH").into());
        }
    };
    if !args.quiet {
        let Copied { bytes, .. } = copied;
        let to = &args.destination;
        let size = format_size(bytes);
        printer.note(format_args!("Successfully copied {size} to {to}"));
    }
    Ok(0)
}

/// Returns the absolute path; paths of a VM are relative to its root.
fn guest_path(path: &str) -> String {
    match path.starts_with('/') {
        true => path.to_owned(),
        false => format!("/{path}"),
    }
}

/// Opens the files of a VM, running or not.
fn open(
    sm: &Sm,
    query: &str,
    scope: FileScope,
    access: FileAccess,
) -> Result<OpenFiles, sm_runtime::Error> {
    sm.vm(query)?.open_files(scope, access)
}

fn copy_stream(from: &mut dyn io::Read, to: &mut dyn io::Write) -> io::Result<()> {
    io::copy(from, to)?;
    to.flush()
}

/// A line of `sm diff --json`.
#[derive(Serialize)]
struct Difference {
    path: String,
    kind: ChangeKind,
}

pub(crate) fn diff(sm: &Sm, args: &DiffArgs, printer: &Printer) -> Result<u32, Failure> {
    let files = open(sm, &args.vm, FileScope::Root, FileAccess::Read)?;
    let mut all = Vec::new();
    for change in files.changes()? {
        let change = change?;
        let path = String::from_utf8_lossy(&change.path.0).into_owned();
        if args.format.json() {
            let kind = change.kind;
            all.push(Difference { path, kind });
            continue;
        }
        let letter = match change.kind {
            ChangeKind::Added => 'A',
            ChangeKind::Deleted => 'D',
            _ => 'C',
        };
        if !printer.line_is_read(format_args!("{letter} {path}")) {
            break;
        }
    }
    if args.format.json() {
        printer.json(&all)?;
    }
    files.close()?;
    Ok(0)
}

pub(crate) fn export(sm: &Sm, args: &ExportArgs) -> Result<u32, Failure> {
    let open = || open(sm, &args.vm, FileScope::Root, FileAccess::Read);
    let Some(path) = &args.output else {
        archive::check_standard_output(" with --output")?;
        let files = open()?;
        let mut from = files.export()?;
        return archive::to_standard_output(|out| {
            copy_stream(&mut from, out).context("cannot write the archive")?;
            Ok(files.close()?)
        });
    };
    let cannot = || format!("cannot write {path:?}");
    let target = destination(path).with_context(cannot)?;
    let files = open()?;
    let mut archive = files.export()?;
    match target {
        Destination::Stream => {
            let file = std::fs::File::options().write(true).open(path);
            let mut out = BufWriter::new(file.with_context(cannot)?);
            copy_stream(&mut archive, &mut out).with_context(cannot)?;
        }
        Destination::File(path) => {
            let mut out = super::archive::new_file(&path).with_context(cannot)?;
            copy_stream(&mut archive, &mut out).with_context(cannot)?;
            out.persist(&path).with_context(cannot)?;
        }
    }
    files.close()?;
    Ok(0)
}

pub(crate) fn commit(sm: &Sm, args: &CommitArgs, printer: &Printer) -> Result<u32, Failure> {
    let vm = sm.vm(&args.vm)?;
    // Invalid instructions must not pause the VM.
    change::apply(&args.change, &mut Default::default())?;
    let processes = match args.pause {
        true => Processes::Pause,
        false => Processes::Run,
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let created = moment::timestamp(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
    let options = CommitOptions::new(created)
        .author(args.author.clone())
        .comment(args.message.clone())
        .processes(processes);
    let bars = Bars::new(printer, false, "Reading");
    let report = |progress: Progress<'_>| bars.show(progress);
    let pull = PullOptions::new().report(&report);
    let mut applied = Ok(());
    let change = |config: &mut sm_runtime::image::Config| {
        applied = change::apply(&args.change, config);
    };
    let committed = vm.commit(args.name.as_deref(), options, change, &pull);
    bars.clear();
    applied?;
    printer.line(committed?);
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_separates_a_vm_from_its_path() {
        let host = |path| Side::Host(Path::new(path));
        for (text, side) in [
            ("-", Side::Stream),
            (
                "web:/etc/hosts",
                Side::Vm {
                    vm: "web",
                    path: "/etc/hosts",
                },
            ),
            (
                "web:",
                Side::Vm {
                    vm: "web",
                    path: "",
                },
            ),
            (
                "web:a:b",
                Side::Vm {
                    vm: "web",
                    path: "a:b",
                },
            ),
            ("/web:x", host("/web:x")),
            ("./web:x", host("./web:x")),
            ("file", host("file")),
            (":x", host(":x")),
        ] {
            assert_eq!(Side::of(text), side, "{text}");
        }
        assert_eq!(guest_path("a/b"), "/a/b");
        assert_eq!(guest_path(""), "/");
    }
}
