//! Names that lead out of the directory where an archive is unpacked.

use super::Outcome::Inside;
use super::support::{file, symlink};
use super::{Case, DOTS, one};

pub(crate) fn traversal() -> Vec<Case> {
    let x = |path: &str| [file(path, b"x")];
    vec![
        one(
            "CVE-2001-1267",
            "GNU tar: ../",
            &x("../../etc/cron.d/x"),
            DOTS,
        ),
        one("CVE-2002-0399", "GNU tar: ./..", &x("./../etc/x"), DOTS),
        one("CVE-2005-1918", "GNU tar: /../", &x("/../etc/x"), DOTS),
        one("CVE-2007-4131", "GNU tar: //..", &x("a//..//../x"), DOTS),
        one(
            "CVE-2016-6321",
            "GNU tar: a member that hides behind another",
            &x("etc/motd/../etc/shadow"),
            DOTS,
        ),
        one(
            "CVE-2007-4559",
            "Python: an absolute name",
            &x("/etc/passwd"),
            Inside,
        ),
        one("CVE-2007-4829", "Perl: ..", &x("d/../../x"), DOTS),
        one("CVE-2013-4420", "libtar: ..", &x(".//..//x"), DOTS),
        one(
            "CVE-2018-1000073",
            "RubyGems: a name that leaves",
            &x("gem/../../x"),
            DOTS,
        ),
        one(
            "CVE-2020-4053",
            "Helm: a plugin that leaves",
            &x("../plugin.yaml"),
            DOTS,
        ),
        one(
            "CVE-2021-32804",
            "node-tar: many slashes",
            &x("////etc/passwd"),
            Inside,
        ),
        one("CVE-2021-37713", "node-tar: a drive", &x("C:../x"), Inside),
        one(
            "CVE-2026-26157",
            "BusyBox: .. at the end",
            &[symlink("s", "/etc/pam.d/.."), file("s/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2018-8115",
            "hcsshim: backslashes",
            &x("..\\..\\windows\\x"),
            Inside,
        ),
        one(
            "CVE-2014-9358",
            "Docker: an ID that is a path",
            &x("a/../../../var/lib/docker/x"),
            DOTS,
        ),
    ]
}
