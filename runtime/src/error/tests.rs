//! Tests of errors.

use super::*;
use crate::record::VmConfig;

#[test]
fn kinds_follow_the_causes() {
    let io = |kind| io::Error::from(kind);
    let file = |source| Error::File {
        operation: "read",
        path: "/x".into(),
        source,
    };
    let record = |source| {
        Error::from(RecordError::Io {
            operation: "create",
            path: "/x".into(),
            source,
        })
    };
    let private = HomeError::NotPrivate {
        path: "/x".into(),
        reason: "other users can write to it",
    };
    let form = |json: &[u8]| RecordError::Form {
        path: "/x".into(),
        source: VmConfig::from_record(json).unwrap_err(),
    };
    let name = || "x".to_owned();
    for (error, kind) in [
        (file(io(io::ErrorKind::NotFound)), ErrorKind::NotFound),
        (file(io(io::ErrorKind::TimedOut)), ErrorKind::Timeout),
        (file(io(io::ErrorKind::Interrupted)), ErrorKind::Other),
        (record(io(io::ErrorKind::StorageFull)), ErrorKind::NoSpace),
        (RecordError::NotFound(name()).into(), ErrorKind::NotFound),
        (RecordError::Running(name()).into(), ErrorKind::Busy),
        (
            RecordError::Home(private).into(),
            ErrorKind::PermissionDenied,
        ),
        (form(b"{").into(), ErrorKind::Damaged),
        (form(br#"{"version": 2}"#).into(), ErrorKind::Unsupported),
        (KernelError::None.into(), ErrorKind::NotFound),
        (
            KernelError::Use {
                path: "/x".into(),
                source: io(io::ErrorKind::PermissionDenied),
            }
            .into(),
            ErrorKind::PermissionDenied,
        ),
        (OptionError::Cpus.into(), ErrorKind::Invalid),
        (StartError::NoProgram.into(), ErrorKind::Start),
        (Refusal::Paused(name()).into(), ErrorKind::Busy),
        (
            sm_image::Error::Ambiguous(name()).into(),
            ErrorKind::Ambiguous,
        ),
        (
            sm_image::Error::Archive(io(io::ErrorKind::PermissionDenied)).into(),
            ErrorKind::PermissionDenied,
        ),
        (
            sm_snapshot::Error::Exists { name: name() }.into(),
            ErrorKind::AlreadyExists,
        ),
    ] {
        assert_eq!(error.kind(), kind, "{error:?}");
    }
}

#[test]
fn only_a_command_has_a_status_of_its_own() {
    let missing = StartError::Command {
        status: 127,
        message: "x: not found".to_owned(),
    };
    let missing = Error::from(missing);
    assert_eq!(
        (missing.exit_status(), missing.kind()),
        (127, ErrorKind::Command)
    );
    let died = |log: &str| {
        Error::from(StartError::Died {
            how: "signal: 9".to_owned(),
            log: log.to_owned(),
        })
    };
    assert_eq!(died("").exit_status(), 125);
    let text = "the VM's process ended unexpectedly (signal: 9)";
    assert_eq!(died("").to_string(), text);
    assert_eq!(died("\n  last").to_string(), format!("{text}:\n  last"));
}
