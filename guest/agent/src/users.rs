//! Resolution of a command's user: `user[:group]` against the image's own files.
//!
//! The files belong to the image and are untrusted data: malformed lines are skipped, and
//! NSS is not used. The rules are Docker's (moby `user.GetExecUser`).

use thiserror::Error;

/// The attributes of a user that a process needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Home directory; `/` if the image has none for the user.
    pub(crate) home: String,
}

/// Failure to resolve a user or group.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum UserError {
    #[error("unable to find user {0}: no matching entries in passwd file")]
    NoUser(String),
    #[error("unable to find group {0}: no matching entries in group file")]
    NoGroup(String),
}

/// Maximum number of supplementary groups (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65_536;

fn fields(line: &[u8]) -> Option<Vec<&str>> {
    let line = std::str::from_utf8(line).ok()?.trim();
    (!line.is_empty() && !line.starts_with('#')).then(|| line.split(':').collect())
}

fn lines(file: &[u8]) -> impl Iterator<Item = Vec<&str>> {
    file.split(|byte| *byte == b'\n').filter_map(fields)
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_entries(file: &[u8]) -> impl Iterator<Item = Passwd<'_>> {
    lines(file).filter_map(|fields| {
        Some(Passwd {
            name: fields.first()?,
            uid: fields.get(2)?.parse().ok()?,
            gid: fields.get(3)?.parse().ok()?,
            home: fields.get(5).copied().unwrap_or_default(),
        })
    })
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn group_entries(file: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(file).filter_map(|fields| {
        Some(Group {
            name: fields.first()?,
            gid: fields.get(2)?.parse().ok()?,
            members: fields.get(3).copied().unwrap_or_default(),
        })
    })
}

fn find_group(spec: &str, group: &[u8]) -> Result<u32, UserError> {
    if let Some(entry) = group_entries(group).find(|entry| entry.name == spec) {
        return Ok(entry.gid);
    }
    spec.parse()
        .map_err(|_| UserError::NoGroup(spec.to_owned()))
}

/// Resolves `spec` (`user`, `user:group`, `:group` or empty for root) and the additional
/// groups `extra` against the contents of the image's `/etc/passwd` and `/etc/group`.
///
/// Names take precedence over equal numbers. A numeric user or group need not have an
/// entry. If a group is named, the user's supplementary groups are dropped.
pub(crate) fn resolve(
    spec: &str,
    extra: &[String],
    passwd: &[u8],
    group: &[u8],
) -> Result<Account, UserError> {
    let (user, named_group) = spec.split_once(':').unwrap_or((spec, ""));
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let entry = passwd_entries(passwd)
        .find(|entry| entry.name == user)
        .or_else(|| passwd_entries(passwd).find(|entry| Some(entry.uid) == number));
    let uid = match (&entry, number) {
        (Some(entry), _) => entry.uid,
        (None, Some(number)) => number,
        (None, None) => return Err(UserError::NoUser(user.to_owned())),
    };
    let mut account = Account {
        uid,
        gid: entry.as_ref().map_or(0, |entry| entry.gid),
        groups: Vec::new(),
        home: match &entry {
            Some(entry) if !entry.home.is_empty() => entry.home.to_owned(),
            _ => "/".to_owned(),
        },
    };
    if !named_group.is_empty() {
        account.gid = find_group(named_group, group)?;
    } else if let Some(entry) = &entry {
        let member = |group: &Group<'_>| group.members.split(',').any(|name| name == entry.name);
        account
            .groups
            .extend(group_entries(group).filter(member).map(|group| group.gid));
    }
    for name in extra {
        account.groups.push(find_group(name, group)?);
    }
    account.groups.sort_unstable();
    account.groups.dedup();
    account.groups.truncate(MAX_GROUPS);
    Ok(account)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n# no\nbroken\nbad:x:u:g::/:\n\
        app:x:1000:1001::/srv/app:/bin/sh\n1000:x:7:7::/odd:\nhomeless:x:9:9\n";
    const GROUP: &[u8] =
        b"root:x:0:\nadm:x:4:root,app\nvideo:x:44:app\napp:x:1001:\n\xff\xfe:x:1:app\n";

    fn who(spec: &str) -> Account {
        resolve(spec, &[], PASSWD, GROUP).unwrap()
    }

    #[test]
    fn empty_is_root_with_its_groups_and_home() {
        let root = who("");
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/root"));
        assert_eq!(root.groups, [4]);
        assert_eq!(who("0"), root);
        assert_eq!(who("root"), root);
    }

    #[test]
    fn a_name_brings_its_primary_and_supplementary_groups() {
        let app = who("app");
        assert_eq!((app.uid, app.gid), (1000, 1001));
        assert_eq!(app.groups, [4, 44]);
        assert_eq!(app.home, "/srv/app");
    }

    #[test]
    fn a_named_group_replaces_them() {
        let app = who("app:video");
        assert_eq!((app.uid, app.gid), (1000, 44));
        assert!(app.groups.is_empty());
        assert_eq!(who("app:77").gid, 77);
        assert_eq!(who(":4").gid, 4);
    }

    #[test]
    fn names_win_over_numbers_and_unknown_numbers_are_fine() {
        assert_eq!(who("1000").uid, 7, "a user may be called 1000");
        let stranger = who("4242");
        assert_eq!((stranger.uid, stranger.gid), (4242, 0));
        assert_eq!(stranger.home, "/");
        assert_eq!(who("homeless").home, "/");
    }

    #[test]
    fn unknown_users_and_groups_are_named() {
        let fail = |spec, extra: &[String]| resolve(spec, extra, PASSWD, GROUP).unwrap_err();
        assert_eq!(fail("bad", &[]), UserError::NoUser("bad".into()));
        assert_eq!(fail("-1", &[]), UserError::NoUser("-1".into()));
        assert_eq!(fail("app:nope", &[]), UserError::NoGroup("nope".into()));
        assert_eq!(fail("app", &["x".into()]), UserError::NoGroup("x".into()));
        assert_eq!(
            resolve("app", &["video".into(), "5".into()], PASSWD, GROUP)
                .unwrap()
                .groups,
            [4, 5, 44]
        );
    }

    #[test]
    fn an_image_without_the_files_still_has_root() {
        let root = resolve("", &[], b"", b"").unwrap();
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/"));
    }
}
