//! The mounts of a new VM: those of its options, of other VMs, and of its image.

use std::path::{Component, Path};

use sm_control::id::{hex, random};
use sm_vmm::disks::MAX_VOLUME_DISKS;

use super::Mount;
use super::mounts::MountKind;
use crate::sm::Sm;
use crate::{Error, Refusal};

/// Most directories of an image whose exclusion is noted. An image may declare any number.
const MAX_NOTED: usize = 64;

/// Directories of the guest that have file systems of the guest, and `/run`, in which each
/// workload finds its epoch. A volume would hide them.
const OF_GUEST: [&str; 4] = ["dev", "proc", "run", "sys"];

/// The mounts of a VM that a new VM gets as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VolumesOf {
    /// Name or identifier of the VM.
    pub(crate) vm: String,
    /// The new VM cannot write to them.
    pub(crate) read_only: bool,
}

/// The mounts of a new VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MountPlan {
    pub(crate) mounts: Vec<Mount>,
    /// Directories that the image declares as volumes and that stay in the root.
    pub(crate) in_root: Vec<String>,
}

/// Returns the mounts of a new VM: the `explicit` ones; the volumes and directories of the
/// host that other VMs mount; and an anonymous volume for each directory that the image
/// declares, as long as the VM has disks for them.
///
/// With `auto_remove`, disks in the record of the VM are its anonymous volumes, so that
/// whatever removes the record removes them.
///
/// # Errors
/// One of the other VMs does not exist, or has no stored mounts.
pub(crate) fn plan(
    sm: &Sm,
    explicit: &[Mount],
    others: &[VolumesOf],
    declared: &[String],
    auto_remove: bool,
) -> Result<MountPlan, Error> {
    let mut mounts: Vec<Mount> = Vec::new();
    for other in others {
        for mount in mounts_of(sm, other)? {
            // As in Docker, the last one counts.
            mounts.retain(|known| !known.is_at(&mount.target));
            mounts.push(mount);
        }
    }
    mounts.retain(|mount| !explicit.iter().any(|wanted| wanted.is_at(&mount.target)));
    mounts.extend_from_slice(explicit);
    let mut in_root = Vec::new();
    let mut disks = mounts.iter().filter(|mount| mount.is_disk()).count();
    for text in declared {
        let Some(target) = declared_target(text) else {
            continue;
        };
        if mounts.iter().any(|mount| mount.is_at(&target)) {
            continue;
        }
        let has_disk = u32::try_from(disks).is_ok_and(|disks| disks < MAX_VOLUME_DISKS);
        if has_disk && !is_of_guest(&target) {
            disks += 1;
            mounts.push(Mount {
                optional: true,
                ..Mount::anonymous(target)
            });
        } else if in_root.len() < MAX_NOTED {
            in_root.push(target);
        }
    }
    for mount in &mut mounts {
        if let MountKind::Volume {
            name, anonymous, ..
        } = &mut mount.kind
            && name.is_none()
        {
            *anonymous = true;
            *name = (!auto_remove).then(|| hex(&random::<32>()));
        }
    }
    Ok(MountPlan { mounts, in_root })
}

/// Returns the volumes and directories of the host that a VM mounts. Guest memory, and disks
/// in its record, are its own.
fn mounts_of(sm: &Sm, other: &VolumesOf) -> Result<Vec<Mount>, Error> {
    let vm = sm.vm(&other.vm)?;
    let settings = vm.record().start_settings();
    let settings = settings.ok_or_else(|| Refusal::NoStartSettings(vm.name().to_owned()))?;
    let mounts = settings.mounts.iter().map(Mount::of_stored);
    let shared = mounts.filter(|mount| match &mount.kind {
        MountKind::Volume { name, .. } => name.is_some(),
        MountKind::Host { .. } => true,
        MountKind::Tmpfs { .. } => false,
    });
    Ok(shared
        .map(|mount| Mount {
            read_only: mount.read_only || other.read_only,
            ..mount
        })
        .collect())
}

impl Mount {
    fn is_at(&self, target: &str) -> bool {
        Path::new(&self.target) == Path::new(target)
    }

    /// Returns true if it occupies one of the VM's disks.
    fn is_disk(&self) -> bool {
        matches!(self.kind, MountKind::Volume { .. })
    }
}

/// Returns the path of a directory that an image declares, which is resolved from the root as
/// Docker does; `None` for the root, and for a text that is no path.
fn declared_target(text: &str) -> Option<String> {
    if text.contains('\0') {
        return None;
    }
    let mut names: Vec<&str> = Vec::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(name) => names.push(name.to_str()?),
            Component::ParentDir => drop(names.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    match names.is_empty() {
        true => None,
        false => Some(format!("/{}", names.join("/"))),
    }
}

fn is_of_guest(target: &str) -> bool {
    let mut names = target.trim_start_matches('/').split('/');
    let first = names.next().unwrap_or_default();
    match first {
        // Other directories below it may be volumes.
        "run" => names.next().is_none(),
        first => OF_GUEST.contains(&first),
    }
}

#[cfg(test)]
mod tests {
    use super::super::VolumeOptions;
    use super::*;

    fn sm() -> (tempfile::TempDir, Sm) {
        let dir = tempfile::tempdir().unwrap();
        let sm = Sm::builder().below(dir.path()).build().unwrap();
        (dir, sm)
    }

    fn declared(targets: &[&str]) -> Vec<String> {
        targets.iter().map(|&target| target.to_owned()).collect()
    }

    #[test]
    fn an_image_with_many_volumes_has_some_in_its_root() {
        let (_dir, sm) = sm();
        let volumes: Vec<String> = (0..10).map(|number| format!("/v{number}")).collect();
        let explicit = [
            Mount::volume("db", "/v3"),
            Mount::tmpfs("/v5/"),
            Mount::host("/srv", "/srv"),
        ];
        let plan = plan(&sm, &explicit, &[], &volumes, false).unwrap();
        let disks = plan.mounts.iter().filter(|mount| mount.is_disk()).count();
        assert_eq!(disks, 7);
        assert_eq!(plan.mounts[..3], explicit);
        assert_eq!(plan.in_root, ["/v8", "/v9"]);
        assert!(plan.mounts[3..].iter().all(|mount| mount.optional));
        // Nothing was created.
        assert!(sm.volumes().names().unwrap().is_empty());
    }

    #[test]
    fn anonymous_volumes_have_names_unless_the_vm_is_removed() {
        let (_dir, sm) = sm();
        let name_with = |auto_remove| {
            let mounts = [Mount::anonymous("/data")];
            let plan = plan(&sm, &mounts, &[], &[], auto_remove).unwrap();
            match &plan.mounts[0].kind {
                MountKind::Volume {
                    name,
                    anonymous: true,
                    ..
                } => name.clone(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(name_with(true), None);
        let name = name_with(false).unwrap();
        assert_eq!(name.len(), 64);
        assert_ne!(name_with(false).unwrap(), name);
        // The volume that a start creates is known as such.
        let mounts = [Mount {
            kind: MountKind::Volume {
                name: Some(name.clone()),
                copy: true,
                anonymous: true,
            },
            ..Mount::anonymous("/data")
        }
        .stored()];
        super::super::requests(&sm.volumes(), &mounts).unwrap();
        assert!(sm.volumes().get(&name).unwrap().is_anonymous());
    }

    #[test]
    fn declared_directories_are_paths_below_the_root() {
        let target = |text: &str| declared_target(text);
        assert_eq!(target("data").as_deref(), Some("/data"));
        assert_eq!(
            target("/var/lib/../db/").as_deref(),
            Some("/var/db"),
            "as Docker cleans paths"
        );
        assert_eq!(target("../../etc").as_deref(), Some("/etc"));
        for none in ["", "/", ".", "a/..", "a\0b"] {
            assert_eq!(target(none), None, "{none:?}");
        }
        let (_dir, sm) = sm();
        let guests = declared(&["/dev/shm", "/proc", "/run", "/sys/fs/cgroup"]);
        let plan = plan(&sm, &[], &[], &guests, false).unwrap();
        assert!(plan.mounts.is_empty());
        assert_eq!(plan.in_root, guests);
        assert!(!is_of_guest("/run/db") && !is_of_guest("/devices"));
    }

    #[test]
    fn volumes_of_another_vm_are_its_named_and_host_mounts() {
        let (dir, sm) = sm();
        sm.volumes()
            .create(Some("db"), &VolumeOptions::new())
            .unwrap();
        let theirs = [
            Mount::volume("db", "/db"),
            Mount::host(dir.path(), "/host").read_only(true),
            Mount::tmpfs("/t"),
            Mount::anonymous("/own"),
            Mount::volume("cfg", "/etc/x"),
        ];
        super::super::tests::vm_with(&sm, "web", &theirs);
        let others = |read_only| {
            [VolumesOf {
                vm: "web".to_owned(),
                read_only,
            }]
        };
        let explicit = [Mount::tmpfs("/etc/x")];
        let found = plan(&sm, &explicit, &others(false), &declared(&["/db"]), true).unwrap();
        assert_eq!(
            found.mounts,
            [theirs[0].clone(), theirs[1].clone(), explicit[0].clone()]
        );
        let found = plan(&sm, &[], &others(true), &[], true).unwrap();
        assert!(found.mounts.iter().all(|mount| mount.read_only));
        let missing = [VolumesOf {
            vm: "none".to_owned(),
            read_only: false,
        }];
        let error = plan(&sm, &[], &missing, &[], true).unwrap_err();
        assert_eq!(error.to_string(), "no such VM: \"none\"");
    }
}
