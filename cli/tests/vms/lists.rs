//! Lists of volumes and images: filters, templates, and what is removed.

use std::fs;
use std::io::Write as _;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::fake::{User, text};

fn out(user: &User, arguments: &[&str]) -> String {
    let done = user.sm(arguments);
    assert!(done.status.success(), "{arguments:?}: {done:?}");
    text(&done.stdout)
}

fn lines(user: &User, arguments: &[&str]) -> Vec<String> {
    out(user, arguments).lines().map(str::to_owned).collect()
}

fn created(user: &User, name: &str, label: &str) {
    let line = ["volume", "create", "--size", "16m", "--label", label, name];
    assert_eq!(out(user, &line), format!("{name}\n"));
}

/// Creates a VM that has ended and mounts a volume at `/data`.
fn vm_with(user: &User, number: u8, name: &str, volume: &str, anonymous: bool) {
    let mut vm = user.vm(number, name);
    let path = vm.directory.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["start"] = json!({
        "source": {"image": {"cold": false}}, "start_timeout_ms": 1,
        "mounts": [
            {"source": {"volume": {"name": volume, "copy": true, "anonymous": anonymous}},
             "target": "/data"},
            {"source": {"host": {"path": "/srv"}}, "target": "/srv", "read_only": true},
        ],
        "volumes_in_root": ["/many"],
    });
    fs::write(&path, config.to_string()).unwrap();
    let exit = json!({"status": 0, "reason": "workload", "finished_ns": 1});
    fs::write(vm.directory.join("exit.json"), exit.to_string()).unwrap();
    vm.dies();
}

#[test]
fn volumes_are_filtered_and_printed_by_templates() {
    let user = User::new();
    created(&user, "db", "tier=back");
    created(&user, "web", "tier=front");
    created(&user, "spare", "old");
    vm_with(&user, 1, "one", "db", false);
    let names = |filters: &[&str]| {
        let filters = filters.iter().flat_map(|filter| ["--filter", filter]);
        let line: Vec<&str> = ["volume", "ls", "-q"].into_iter().chain(filters).collect();
        lines(&user, &line)
    };
    assert_eq!(names(&[]), ["db", "spare", "web"]);
    assert_eq!(names(&["label=tier"]), ["db", "web"]);
    assert_eq!(names(&["label=tier=back"]), ["db"]);
    assert_eq!(names(&["name=b"]), ["db", "web"]);
    assert_eq!(names(&["dangling=true", "name=b"]), ["web"]);
    assert_eq!(names(&["dangling=false"]), ["db"]);
    assert_eq!(names(&["driver=nfs"]).len(), 0);
    let line = ["volume", "ls", "-f", "name=db", "--format"];
    let shown = |format: &str| out(&user, &[&line[..], &[format]].concat());
    assert_eq!(shown("{{.Name}} {{.Label \"tier\"}}"), "db back\n");
    assert_eq!(shown("{{.Name}}|{{.Driver}}"), "db|local\n");
    assert_eq!(
        shown("table {{.Name}}\\t{{.Labels}}"),
        "NAME   LABELS\ndb     tier=back\n"
    );
    let json: Value = serde_json::from_str(&shown("json")).unwrap();
    assert_eq!(json[0]["labels"]["tier"], "back");
    for (arguments, words) in [
        (
            &["volume", "ls", "-f", "colour=red"][..],
            "these are: dangling",
        ),
        (&["volume", "ls", "-f", "dangling=maybe"], "true or false"),
        (
            &["volume", "ls", "--format", "{{.Colour}}"],
            "there is no .Colour here",
        ),
    ] {
        let done = user.sm(arguments);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        assert!(text(&done.stderr).contains(words), "{done:?}");
    }
}

#[test]
fn names_of_volumes_are_listed_without_opening_them() {
    let user = User::new();
    created(&user, "db", "a");
    fs::remove_file(user.path("data/sm/volumes/db/volume.json")).unwrap();
    fs::create_dir(user.path("data/sm/volumes/db/volume.json")).unwrap();
    for line in [
        &["volume", "ls", "-q"][..],
        &["volume", "ls", "--format", "{{.Name}}"],
        &["volume", "ls", "-q", "--filter", "dangling=true"],
    ] {
        assert_eq!(out(&user, line), "db\n", "{line:?}");
    }
    assert_eq!(user.sm(&["volume", "ls"]).status.code(), Some(1));
}

#[test]
fn volumes_that_vms_need_are_not_removed() {
    let user = User::new();
    created(&user, "db", "a");
    created(&user, "named", "a");
    let anonymous = out(&user, &["volume", "create", "--size", "16m"]);
    let anonymous = anonymous.trim();
    vm_with(&user, 1, "one", "db", false);
    vm_with(&user, 2, "two", anonymous, true);
    let done = user.sm(&["volume", "rm", "db"]);
    assert_eq!(done.status.code(), Some(1));
    let words = "volume \"db\" is in use by VM \"one\"";
    assert!(text(&done.stderr).contains(words), "{done:?}");
    let done = user.sm(&["volume", "prune"]);
    assert!(text(&done.stderr).contains("--force"), "{done:?}");
    let pruned = out(&user, &["volume", "prune", "-f"]);
    assert_eq!(pruned.lines().count(), 1, "{pruned}");
    let usage = out(&user, &["system", "df"]);
    let row = usage.lines().find(|line| line.starts_with("Volumes"));
    let cells: Vec<&str> = row.unwrap().split_whitespace().collect();
    assert_eq!(cells[1..3], ["3", "2"]);
    assert_eq!(out(&user, &["rm", "-v", "two"]), "two\n");
    assert_eq!(lines(&user, &["volume", "ls", "-q"]), ["db", "named"]);
    let pruned = out(
        &user,
        &["volume", "prune", "-f", "-a", "--filter", "label=b"],
    );
    assert_eq!(pruned.lines().count(), 1, "{pruned}");
    let pruned = lines(&user, &["volume", "prune", "-f", "--filter", "all=1"]);
    assert_eq!(pruned[0], "named");
    let left = out(&user, &["volume", "create", "--size", "16m"]);
    let pruned = lines(&user, &["system", "prune", "-f", "--volumes"]);
    assert_eq!(pruned[..2], ["one", left.trim()]);
    assert_eq!(lines(&user, &["volume", "ls", "-q"]), ["db"]);
}

#[test]
fn inspect_shows_mounts() {
    let user = User::new();
    vm_with(&user, 1, "one", "db", true);
    let shown: Value = serde_json::from_str(&out(&user, &["inspect", "one"])).unwrap();
    let one = &shown[0];
    assert_eq!(
        one["mounts"][0],
        json!({
            "type": "volume", "name": "db", "target": "/data", "read_only": false,
            "anonymous": true,
        })
    );
    assert_eq!(one["volumes_in_root"], json!(["/many"]));
    assert_eq!(
        one["Mounts"][1],
        json!({
            "Type": "bind", "Name": "", "Source": "/srv", "Destination": "/srv", "Mode": "ro",
            "RW": false,
        })
    );
    for value in ["db", "/srv"] {
        let filter = format!("volume={value}");
        let line = [
            "ps",
            "-a",
            "-f",
            &filter,
            "--format",
            "{{.Names}} {{.Mounts}}",
        ];
        assert_eq!(out(&user, &line), "one db,/srv\n");
    }
    assert_eq!(out(&user, &["ps", "-aq", "-f", "volume=/dat"]), "");
}

#[test]
fn images_are_filtered_and_printed_by_templates() {
    let user = User::new();
    for (name, change) in [
        ("mine:1", "LABEL a=b"),
        ("mine:2", "USER x"),
        ("other", "USER y"),
    ] {
        let mut import = user.command(&["import", "-c", change, "-", name]);
        let import = import.stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        let mut import = import.unwrap();
        // The end of an archive without entries.
        import.stdin.take().unwrap().write_all(&[0; 1024]).unwrap();
        assert!(import.wait().unwrap().success());
    }
    let tags = |arguments: &[&str]| {
        let line = ["images", "--format", "{{.Tag}}"];
        let mut tags = lines(&user, &[&line[..], arguments].concat());
        tags.sort();
        tags
    };
    assert_eq!(tags(&[]), ["1", "2", "latest"]);
    assert_eq!(tags(&["mine"]), ["1", "2"]);
    assert_eq!(tags(&["mine:1"]), ["1"]);
    assert_eq!(tags(&["-f", "reference=mi*:2"]), ["2"]);
    assert_eq!(tags(&["-f", "label=a"]), ["1"]);
    assert_eq!(tags(&["-f", "label=a=c"]).len(), 0);
    assert_eq!(tags(&["-f", "since=mine:1"]), ["2", "latest"]);
    assert_eq!(tags(&["-f", "before=mine:2"]), ["1"]);
    assert_eq!(tags(&["-f", "dangling=true"]).len(), 0);
    let done = user.sm(&["images", "-f", "since=none"]);
    assert!(
        text(&done.stderr).contains("there is no image \"none\""),
        "{done:?}"
    );
    let line = out(
        &user,
        &["images", "--format", "{{.Repository}}:{{.Tag}}", "mine:1"],
    );
    assert!(line.trim().ends_with("mine:1"), "{line}");
}
