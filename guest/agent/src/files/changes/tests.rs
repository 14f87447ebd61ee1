use std::fs::{self, File};
use std::os::unix::fs::symlink;

use rustix::fs::{XattrFlags, fsetxattr, mknodat};

use super::*;

/// Three directories in the place of the trees.
struct Fixture {
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new(build: impl FnOnce(&dyn Fn(&str) -> PathBuf)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["upper", "lower", "merged"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        build(&|name| directory.path().join(name));
        Self { directory }
    }

    fn compare(&self) -> Vec<String> {
        let open = |name| File::open(self.directory.path().join(name)).unwrap();
        let (upper, lower, merged) = (open("upper"), open("lower"), open("merged"));
        let trees = Trees {
            upper: upper.as_fd(),
            lower: lower.as_fd(),
            merged: merged.as_fd(),
        };
        let mut found = Listing(trees, Vec::new());
        trees.compare(&mut found).unwrap();
        found.1
    }
}

struct Listing<'a>(Trees<'a>, Vec<String>);

impl Differences for Listing<'_> {
    fn enter(&mut self, path: &Path, differs: bool) -> io::Result<()> {
        self.1.push(format!("> {} {differs}", path.display()));
        Ok(())
    }
    fn leave(&mut self) -> io::Result<()> {
        self.1.push("<".to_owned());
        Ok(())
    }
    fn file(&mut self, path: &Path, kind: ChangeKind) -> io::Result<()> {
        self.1.push(format!("{kind:?} {}", path.display()));
        Ok(())
    }
    fn deleted(&mut self, path: &Path) -> io::Result<()> {
        self.file(path, ChangeKind::Deleted)
    }
    fn subtree(&mut self, path: &Path, kind: ChangeKind, replaces: bool) -> io::Result<()> {
        let Self(trees, found) = self;
        found.push(format!("{kind:?} {} {replaces}", path.display()));
        trees.compare_subtree(path, &mut |path, kind| {
            found.push(format!("  {kind:?} {}", path.display()));
            Ok(())
        })
    }
}

#[test]
fn files_are_compared_with_those_of_the_image() {
    let fixture = Fixture::new(|at| {
        for name in ["same", "longer", "mode", "type"] {
            fs::write(at("lower").join(name), "x").unwrap();
        }
        let copy = |name: &str| {
            let (from, to) = (at("lower").join(name), at("upper").join(name));
            fs::copy(&from, &to).unwrap();
            let time = fs::metadata(from).unwrap().modified().unwrap();
            File::open(to).unwrap().set_modified(time).unwrap();
        };
        for name in ["same", "longer", "mode"] {
            copy(name);
        }
        fs::write(at("upper/longer"), "xy").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o751);
        fs::set_permissions(at("upper/mode"), mode).unwrap();
        symlink("x", at("upper/type")).unwrap();
        fs::write(at("upper/new"), "").unwrap();
    });
    assert_eq!(
        fixture.compare(),
        [
            "Changed longer",
            "Changed mode",
            "Added new",
            "Changed type"
        ]
    );
}

#[test]
fn files_of_the_agent_are_no_differences() {
    let fixture = Fixture::new(|at| {
        for name in ["dev", "proc", "sys", "etc", "run"] {
            fs::create_dir(at("upper").join(name)).unwrap();
        }
        for name in ["hostname", "hosts", "machine-id", "resolv.conf", "mine"] {
            fs::write(at("upper/etc").join(name), "").unwrap();
        }
        fs::write(at("upper/run/sm-epoch"), "").unwrap();
        // The image may lack the other directory.
        fs::create_dir(at("lower/etc")).unwrap();
    });
    assert_eq!(
        fixture.compare(),
        ["> etc false", "Added etc/mine", "<", "> run false", "<"]
    );
}

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    let missing = "whiteouts and attributes of overlays take root";
    sm_test_needs::met("root", (!is_root).then_some(missing))
}

#[test]
fn whiteouts_are_deletions() {
    if !is_root() {
        return;
    }
    let fixture = Fixture::new(|at| {
        fs::write(at("lower/gone"), "").unwrap();
        for name in ["gone", "never"] {
            let path = at("upper").join(name);
            let kind = FileType::CharacterDevice;
            mknodat(rustix::fs::CWD, path, kind, Mode::empty(), 0).unwrap();
        }
    });
    assert_eq!(fixture.compare(), ["Deleted gone"]);
}

#[test]
fn directories_that_do_not_continue_are_compared_as_they_are_shown() {
    if !is_root() {
        return;
    }
    for attribute in ["trusted.overlay.opaque", "trusted.overlay.redirect"] {
        let fixture = Fixture::new(|at| {
            for tree in ["upper", "lower", "merged"] {
                fs::create_dir(at(tree).join("d")).unwrap();
            }
            fs::write(at("lower/d/gone"), "").unwrap();
            fs::create_dir(at("merged/d/sub")).unwrap();
            fs::write(at("merged/d/sub/new"), "").unwrap();
            let directory = File::open(at("upper/d")).unwrap();
            fsetxattr(&directory, attribute, b"y", XattrFlags::empty()).unwrap();
        });
        assert_eq!(
            fixture.compare(),
            [
                "Changed d true",
                "  Added d/sub",
                "  Added d/sub/new",
                "  Deleted d/gone"
            ],
            "{attribute}"
        );
    }
}
