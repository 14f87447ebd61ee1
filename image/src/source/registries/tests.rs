use std::fs;

use proptest::prelude::*;

use super::*;

fn parsed(text: &str) -> Registries {
    let mut all = Registries::default();
    all.add(text, Path::new("/etc/x.conf")).unwrap();
    all
}

/// Formats mirrors and the registry itself as `HOST/REPOSITORY`, with `!` if insecure.
fn locations(all: &Registries, name: &str) -> Vec<String> {
    let locations = all
        .locations(&DockerReference::parse(name).unwrap())
        .unwrap();
    let mut texts = Vec::new();
    for location in locations.mirrors.into_iter().chain([locations.own]) {
        let mark = if location.insecure { "!" } else { "" };
        texts.push(format!("{}/{}{mark}", location.host, location.name));
    }
    texts
}

#[track_caller]
fn wrong(text: &str, word: &str) {
    let mut all = Registries::default();
    let error = all.add(text, Path::new("x")).unwrap_err();
    assert!(error.contains(word), "{word:?} is not in {error:?}");
}

#[test]
fn without_a_table_the_reference_names_the_location() {
    let all = parsed("unqualified-search-registries = ['quay.io']\nshort-name-mode = 'enforcing'");
    assert_eq!(
        locations(&all, "nginx"),
        ["registry-1.docker.io/library/nginx"]
    );
    assert_eq!(locations(&all, "r.example/a/b"), ["r.example/a/b"]);
}

#[test]
fn locations_replace_the_longest_prefix() {
    let all = parsed(
        r#"
        [[registry]]
        location = "r.example"
        insecure = true

        [[registry]]
        prefix = "r.example/team"
        location = "other.example:5000/moved/"

        [[registry]]
        prefix = "docker.io"
        location = "cache.example/docker"
        "#,
    );
    assert_eq!(locations(&all, "r.example/a"), ["r.example/a!"]);
    assert_eq!(
        locations(&all, "r.example/team/app:v1"),
        ["other.example:5000/moved/app"]
    );
    assert_eq!(
        locations(&all, "r.example/teams/app"),
        ["r.example/teams/app!"]
    );
    assert_eq!(locations(&all, "r.example.org/a"), ["r.example.org/a"]);
    assert_eq!(
        locations(&all, "nginx"),
        ["cache.example/docker/library/nginx"]
    );
}

#[test]
fn prefixes_can_be_images_and_all_hosts_below_one() {
    let all = parsed(
        r#"
        [[registry]]
        prefix = "*.below.example"
        insecure = true

        [[registry]]
        prefix = "*.moved.example"
        location = "there.example/all"

        [[registry]]
        prefix = "r.example/app:old"
        location = "archive.example/app:older"
        "#,
    );
    assert_eq!(locations(&all, "a.below.example/x"), ["a.below.example/x!"]);
    assert_eq!(
        locations(&all, "a.b.below.example:5000/x"),
        ["a.b.below.example:5000/x!"]
    );
    assert_eq!(locations(&all, "below.example/x"), ["below.example/x"]);
    assert_eq!(
        locations(&all, "evil.example/a.below.example/x"),
        ["evil.example/a.below.example/x"]
    );
    assert_eq!(
        locations(&all, "a.moved.example/x/y"),
        ["there.example/all/x/y"]
    );
    assert_eq!(
        locations(&all, "r.example/app:old"),
        ["archive.example/app"]
    );
    assert_eq!(locations(&all, "r.example/app:new"), ["r.example/app"]);
}

#[test]
fn mirrors_come_first_if_they_serve_such_references() {
    let digest = crate::Digest::of(b"x");
    let by_digest = format!("r.example/a@{digest}");
    let all = parsed(
        r#"
        [[registry]]
        location = "r.example"
        [[registry.mirror]]
        location = "one.example"
        [[registry.mirror]]
        location = "two.example/sub"
        insecure = true
        pull-from-mirror = "digest-only"
        [[registry.mirror]]
        location = "three.example"
        pull-from-mirror = "tag-only"
        "#,
    );
    assert_eq!(
        locations(&all, "r.example/a"),
        ["one.example/a", "three.example/a", "r.example/a"]
    );
    assert_eq!(
        locations(&all, &by_digest),
        ["one.example/a", "two.example/sub/a!", "r.example/a"]
    );
    let all = parsed(
        r#"
        [[registry]]
        location = "r.example"
        mirror-by-digest-only = true
        mirror = [{ location = "one.example" }]
        "#,
    );
    assert_eq!(locations(&all, "r.example/a"), ["r.example/a"]);
    assert_eq!(
        locations(&all, &by_digest),
        ["one.example/a", "r.example/a"]
    );
}

#[test]
fn blocked_registries_are_not_asked() {
    let all = parsed("[[registry]]\nlocation = 'r.example'\nblocked = true");
    let error = all
        .locations(&DockerReference::parse("r.example/a").unwrap())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("r.example") && error.contains("/etc/x.conf"),
        "{error}"
    );
}

#[test]
fn aliases_are_added_and_removed() {
    let mut all = parsed("[aliases]\nubi8 = 'r.example/ubi8'\ncentos = 'quay.io/centos/centos'");
    all.add(
        "[aliases]\ncentos = ''\nfedora = 'f.example/fedora'",
        Path::new("y"),
    )
    .unwrap();
    assert_eq!(all.alias("ubi8"), Some("r.example/ubi8"));
    assert_eq!(all.alias("centos"), None);
    assert_eq!(all.alias("fedora"), Some("f.example/fedora"));
}

#[test]
fn invalid_configurations_are_reported() {
    wrong("[[registry", "");
    wrong(
        "[registries.search]\nregistries = ['docker.io']",
        "version 1",
    );
    wrong(
        "[[registry]]\ninsecure = true",
        "neither prefix nor location",
    );
    wrong("[[registry]]\nprefix = 'r.example'", "has no location");
    wrong(
        "[[registry]]\nprefix = 'a.*.example'\nlocation = 'b'",
        "is not valid",
    );
    wrong("[[registry]]\nprefix = '*.'\n", "is not valid");
    wrong(
        "[[registry]]\nlocation = 'https://r.example'",
        "only host and path",
    );
    wrong(
        "[[registry]]\nlocation = 'a'\n[[registry.mirror]]\ninsecure = true",
        "mirror of",
    );
    wrong(
        "[[registry]]\nlocation = 'a'\nmirror = [{location = 'b', pull-from-mirror = 'never'}]",
        "never",
    );
    wrong(
        "[[registry]]\nlocation = 'a'\nmirror-by-digest-only = true\n\
         mirror = [{location = 'b', pull-from-mirror = 'tag-only'}]",
        "both",
    );
    wrong("[aliases]\nx = 'nginx'", "has no registry");
    wrong("[aliases]\nx = 'r.example/a:tag'", "has no registry");
    let all = parsed("[[registry]]\nprefix = 'r.example'\nlocation = 'UPPER.example/Case'");
    let reference = DockerReference::parse("r.example/a").unwrap();
    let error = all.locations(&reference).unwrap_err();
    assert!(error.to_string().contains("/etc/x.conf"), "{error}");
}

#[test]
fn files_are_searched_in_the_paths_of_podman() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let (system, home) = (root.join("etc"), root.join("home"));
    let own = home.join(".config/containers");
    for directory in [&system, &own] {
        fs::create_dir_all(directory.join("registries.conf.d")).unwrap();
        for name in ["b.conf", "a.conf", "README"] {
            fs::write(directory.join("registries.conf.d").join(name), "").unwrap();
        }
    }
    let names = |variables: &[(&str, &Path)]| -> Vec<String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.as_os_str().to_owned())
        };
        let short = |path: PathBuf| path.strip_prefix(root).unwrap().display().to_string();
        files(&system, &variable).into_iter().map(short).collect()
    };
    let drop_ins = |directory: &str| {
        ["a", "b"].map(|name| format!("{directory}/registries.conf.d/{name}.conf"))
    };
    let (system_ones, own_ones) = (drop_ins("etc"), drop_ins("home/.config/containers"));
    let all = |file: &str| [&[file.to_owned()], &system_ones[..], &own_ones[..]].concat();
    assert_eq!(names(&[("HOME", &home)]), all("etc/registries.conf"));
    let given = root.join("given.conf");
    let with_file = [("HOME", &*home), ("CONTAINERS_REGISTRIES_CONF", &*given)];
    assert_eq!(names(&with_file), all("given.conf"));
    fs::write(own.join("registries.conf"), "").unwrap();
    assert_eq!(
        names(&[("HOME", &home)]),
        [
            &["home/.config/containers/registries.conf".to_owned()],
            &own_ones[..]
        ]
        .concat()
    );
    let elsewhere = [("HOME", &*home), ("XDG_CONFIG_HOME", root)];
    assert_eq!(
        names(&elsewhere),
        [&["etc/registries.conf".to_owned()], &system_ones[..]].concat()
    );
}

#[test]
fn later_files_win_and_wrong_ones_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let one = write(
        "one",
        "[[registry]]\nlocation = 'r.example'\nblocked = true",
    );
    let two = write(
        "two",
        "[[registry]]\nprefix = 'r.example'\nlocation = 's.example'",
    );
    let missing = directory.path().join("missing");
    let all = Registries::read(&[one, missing, two]).unwrap();
    assert_eq!(locations(&all, "r.example/a"), ["s.example/a"]);
    let broken = write("broken", "x = ");
    let error = Registries::read(std::slice::from_ref(&broken)).unwrap_err();
    assert!(error.to_string().contains("broken"), "{error}");
    fs::write(&broken, vec![b' '; 2 << 20]).unwrap();
    assert!(Registries::read(&[broken]).is_err());
}

proptest! {
    #[test]
    fn any_text_is_parsed_without_panic(text in "(\\[\\[registry(.mirror)?\\]\\]\n|location = '[a-z*./]{0,6}'\n|prefix = '[a-z*.]{0,6}'\n|\\PC{0,10}){0,8}") {
        let mut all = Registries::default();
        if all.add(&text, Path::new("x")).is_ok() {
            let _ = all.locations(&DockerReference::parse("a.b/c:d").unwrap());
        }
    }

    #[test]
    fn a_match_is_a_prefix(name in "[a-c./:]{1,12}", prefix in "(\\*\\.)?[a-c./]{1,6}") {
        if let Some(end) = match_prefix(&name, &prefix) {
            prop_assert!(name.is_char_boundary(end));
            prop_assert!(name[..end].ends_with(prefix.trim_start_matches('*')));
        }
    }
}
