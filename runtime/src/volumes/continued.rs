//! Mounts of the host in VMs that continue a snapshot.
//!
//! A snapshot has the names of what was mounted, which are no right to it: a caller supplies
//! the mounts again. Clones of a VM that runs get its own, whose right is in its record.

use sm_control::config::{MountSourceV1, MountV1, StartSettingsV1};
use sm_vmm::saved::{self, SavedShare, ShareMismatch};

use super::Mount;
use crate::{Error, FixedOption, OptionError};

/// Returns true for a path of the host, or a volume where the snapshot has a directory mounted.
fn is_shared(mount: &MountV1, shares: &[SavedShare]) -> bool {
    match &mount.source {
        MountSourceV1::Host { .. } => true,
        MountSourceV1::Volume { name: Some(_), .. } => {
            shares.iter().any(|share| share.target == mount.target)
        }
        MountSourceV1::Volume { name: None, .. } | MountSourceV1::Tmpfs { .. } => false,
    }
}

/// Checks the mounts for a VM that continues a snapshot with `shares`.
///
/// # Errors
/// One is missing, or is not in the snapshot.
pub(crate) fn check(shares: &[SavedShare], mounts: &[Mount]) -> Result<(), Error> {
    let mounts: Vec<_> = mounts.iter().map(Mount::stored).collect();
    if !mounts.iter().all(|mount| is_shared(mount, shares)) {
        return Err(OptionError::Fixed(FixedOption::Mounts).into());
    }
    match saved::arrange(shares, mounts, |mount| &mount.target) {
        Ok(_) => Ok(()),
        Err(ShareMismatch::Missing { target, path }) => {
            Err(OptionError::MountMissing { target, path }.into())
        }
        Err(ShareMismatch::Unknown { target }) => Err(OptionError::MountUnknown(target).into()),
        Err(other) => Err(OptionError::MountUnknown(other.to_string()).into()),
    }
}

/// Returns the mounts with which a VM with these settings has the `shares` of a snapshot of it.
pub(crate) fn of_vm(settings: Option<&StartSettingsV1>, shares: &[SavedShare]) -> Vec<Mount> {
    let mounts = settings.map_or(&[][..], |settings| &settings.mounts);
    let mount = |mount: &MountV1| {
        let target = &mount.target;
        let again = match &mount.source {
            MountSourceV1::Host { path, options } => {
                let host = Mount::host(path, target)
                    .chown(options.chown)
                    .watch(options.watch);
                match options.owner {
                    Some(owner) => host.owner(owner),
                    None => host,
                }
            }
            MountSourceV1::Volume {
                name: Some(name), ..
            } => Mount::volume(name, target),
            MountSourceV1::Volume { name: None, .. } | MountSourceV1::Tmpfs { .. } => return None,
        };
        let is_share = shares.iter().any(|share| share.target == *target);
        is_share.then(|| again.read_only(mount.read_only))
    };
    mounts.iter().filter_map(mount).collect()
}

/// Checks that not more than one of `count` clones writes to a directory of the host that is
/// no volume.
///
/// # Errors
/// Several do.
pub(crate) fn check_writers<'a>(
    count: usize,
    mounts: impl IntoIterator<Item = &'a MountV1>,
) -> Result<(), Error> {
    for mount in mounts {
        if let MountSourceV1::Host { path, .. } = &mount.source
            && !mount.read_only
            && count > 1
        {
            let path = path.clone();
            return Err(OptionError::ManyWriters { count, path }.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sm_control::config::{HostChown, HostOwner, SettingsSourceV1};

    use super::*;
    use crate::run::RunOptions;

    fn share(target: &str) -> SavedShare {
        SavedShare {
            target: target.to_owned(),
            directory: "/home/me".into(),
            file: None,
            volume: None,
            read_only: false,
        }
    }

    #[test]
    fn mounts_are_supplied_again() {
        let shares = [share("/a"), share("/b")];
        let (a, b) = (
            Mount::host("/x", "/a"),
            Mount::host("/y", "/b").read_only(true),
        );
        let refused = |mounts: &[&Mount]| {
            let mounts: Vec<_> = mounts.iter().copied().cloned().collect();
            check(&shares, &mounts).err().map(|error| error.to_string())
        };
        assert_eq!(refused(&[&b, &a]), None);
        let missing = refused(&[&b]).unwrap();
        assert!(
            missing.contains("\"/home/me\" of the host was mounted at \"/a\""),
            "{missing}"
        );
        let more = refused(&[&a, &b, &Mount::host("/z", "/c")]).unwrap();
        assert!(
            more.contains("nothing of the host is mounted at \"/c\""),
            "{more}"
        );
        for fixed in [
            Mount::tmpfs("/t"),
            Mount::volume("v", "/v"),
            Mount::anonymous("/v"),
        ] {
            let error = refused(&[&a, &b, &fixed]).unwrap();
            assert!(error.contains("the list of mounts"), "{error}");
        }
        assert!(check(&[], &[]).is_ok());
        assert!(check(&[], &[a]).is_err());
    }

    #[test]
    fn clones_of_a_vm_have_its_mounts_of_the_host() {
        let mounts = [
            Mount::host("/x", "/a")
                .owner(HostOwner::Fixed { uid: 1, gid: 2 })
                .watch(true),
            Mount::host("/y", "/b")
                .read_only(true)
                .chown(HostChown::Deny),
        ];
        let mut options = RunOptions::new().mount(Mount::tmpfs("/t"));
        for mount in &mounts {
            options = options.mount(mount.clone());
        }
        let volume = Mount::volume("shared", "/v");
        options = options
            .mount(volume.clone())
            .mount(Mount::volume("disk", "/d"));
        let settings = options.settings(SettingsSourceV1::Image { cold: false });
        let shares = ["/a", "/b", "/v"].map(share);
        let [a, b] = mounts.clone();
        assert_eq!(of_vm(Some(&settings), &shares), [a, b, volume.clone()]);
        assert!(of_vm(None, &shares).is_empty());
        assert!(check(&shares, &of_vm(Some(&settings), &shares)).is_ok());
        let mounts = mounts.map(|mount| mount.stored());
        assert!(check_writers(9, &[volume.stored()]).is_ok());
        assert!(check_writers(1, &mounts).is_ok());
        assert!(check_writers(9, &mounts[1..]).is_ok());
        let error = check_writers(2, &mounts).unwrap_err().to_string();
        assert!(error.contains("2 clones would write to \"/x\""), "{error}");
    }
}
