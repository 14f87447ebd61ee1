//! Real programs on volumes, roots and directories of the host: databases whose VM is
//! killed, builds, a web server.
#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a failed expectation is a failed test"
)]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::PathBuf;

use sm_e2e::{Home, Reaped, Vm, image, unique, until};

/// Changes that a database must have confirmed before its VM is killed.
const CONFIRMED: usize = 30;

/// The image with databases and build tools.
fn work() -> String {
    let images = PathBuf::from(std::env::var_os("SM_WORK").expect("SM_WORK is set"));
    format!("oci:{}", images.join("work").display())
}

/// A volume that is removed when the value is dropped.
struct Volume<'a>(&'a Home, String);

impl<'a> Volume<'a> {
    fn new(home: &'a Home) -> Self {
        let name = unique("work");
        home.sm(&["volume", "create", "--size", "4g", &name])
            .exits(0);
        Self(home, name)
    }
}

impl Drop for Volume<'_> {
    fn drop(&mut self) {
        self.0.sm(&["volume", "rm", "-f", &self.1]);
    }
}

/// A database, with the commands that the test needs.
struct Database<'a> {
    vm: Vm<'a>,
    /// Prints something when the server answers.
    ready: &'a str,
    /// Adds the numbers from the first argument on, one transaction each, and prints each
    /// number when its transaction is confirmed.
    insert: &'a str,
    /// Prints the largest number, and the count of numbers.
    count: &'a str,
}

impl Database<'_> {
    fn sh(&self, script: &str) -> String {
        self.vm.exec(&["bash", "-c", script]).exits(0).out()
    }

    fn wait(&self) {
        until("the server answers", || {
            let answer = self.vm.exec(&["bash", "-c", self.ready]);
            let ended = answer.err().contains("is not running");
            assert!(!ended, "the server has ended");
            answer.code == Some(0)
        });
    }

    /// Adds numbers from `first` on, and kills the VM's process amid them. Returns the
    /// last confirmed number.
    fn kill_amid_changes(&self, home: &Home, first: usize) -> usize {
        let script = self.insert.replace("FIRST", &first.to_string());
        let mut inserting = home.command(&["exec", &self.vm.name, "bash", "-c", &script]);
        let mut inserting = Reaped(inserting.spawn().unwrap());
        let lines = BufReader::new(inserting.0.stdout.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok);
        let mut confirmed: usize = 0;
        for line in lines.by_ref().take(CONFIRMED) {
            confirmed = line.trim().parse().unwrap();
        }
        assert_eq!(confirmed, first + CONFIRMED - 1);
        let pid = self.vm.inspect()["State"]["Pid"].as_i64().unwrap();
        let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        // More may have been confirmed in the meantime.
        for line in lines {
            confirmed = line.trim().parse().unwrap_or(confirmed);
        }
        confirmed
    }

    /// Checks that every number up to the last confirmed one is there.
    fn has(&self, confirmed: usize) -> usize {
        let out = self.sh(self.count);
        let mut numbers = out
            .split_whitespace()
            .map(|it| it.parse::<usize>().unwrap());
        let (largest, count) = (numbers.next().unwrap(), numbers.next().unwrap());
        assert!(
            largest >= confirmed,
            "{confirmed} confirmed, {largest} kept"
        );
        assert_eq!(largest, count, "numbers are missing");
        largest
    }

    /// Kills the VM amid changes and starts it again, twice, then stops and starts it.
    fn survives(&self, home: &Home) {
        self.wait();
        let mut kept = 0;
        for _ in 0..2 {
            let confirmed = self.kill_amid_changes(home, kept + 1);
            home.sm(&["start", &self.vm.name]).exits(0);
            self.wait();
            kept = self.has(confirmed);
        }
        home.sm(&["stop", "-t", "120", &self.vm.name]).exits(0);
        home.sm(&["start", &self.vm.name]).exits(0);
        self.wait();
        assert_eq!(self.has(kept), kept);
    }
}

#[test]
fn full_postgresql_recovers_on_a_volume() {
    let home = Home::shared();
    let volume = Volume::new(home);
    let mount = format!("{}:/var/lib/postgresql", volume.1);
    let serve = "set -e
        export PGDATA=/var/lib/postgresql/data
        cd /usr/lib/postgresql/15/bin
        [ -s $PGDATA/PG_VERSION ] || ./initdb -A trust --no-instructions
        exec ./postgres -k /tmp";
    let options = ["-m", "512m", "-v", &mount, "-u", "postgres"];
    let database = Database {
        vm: home.detached(&[&options[..], &[&work(), "bash", "-c", serve]].concat()),
        ready: "psql -h /tmp -qtAc 'create table if not exists own (n int)' postgres",
        insert: "seq FIRST 1000000 | sed 's/.*/insert into own values (&) returning n;/' |
            psql -h /tmp -qtA postgres",
        count: "psql -h /tmp -qtA -F ' ' -c 'select max(n), count(distinct n) from own' postgres",
    };
    database.survives(home);
    // A benchmark of its own, whose sums must agree.
    let bench = "cd /usr/lib/postgresql/15/bin && createdb -h /tmp bench &&
        ./pgbench -h /tmp -i -q -s 1 bench && ./pgbench -h /tmp -n -c 2 -t 25 bench >&2 &&
        psql -h /tmp -qtAc 'select sum(abalance) - (select sum(delta) from pgbench_history),
            (select count(*) from pgbench_history) from pgbench_accounts' bench";
    assert_eq!(database.sh(bench).trim(), "0|50");
}

#[test]
fn full_mariadb_recovers_on_its_root() {
    let home = Home::shared();
    let serve = "set -e
        [ -d /srv/data/mysql ] || {
            mkdir -p /srv/data && chown mysql:mysql /srv/data
            mariadb-install-db --user=mysql --datadir=/srv/data --auth-root-authentication-method=normal
        } >/dev/null
        exec mariadbd --user=mysql --datadir=/srv/data --skip-networking --socket=/tmp/socket \
            --pid-file=/tmp/pid";
    let database = Database {
        vm: home.detached(&["-m", "768m", &work(), "bash", "-c", serve]),
        ready: "mariadb -S /tmp/socket -e 'create table if not exists test.own (n int)'",
        insert: "seq FIRST 1000000 | sed 's/.*/insert into own values (&); select &;/' |
            mariadb -S /tmp/socket -N --unbuffered test",
        count: "mariadb -S /tmp/socket -N -e 'select max(n), count(distinct n) from own' test",
    };
    database.survives(home);
}

#[test]
fn full_redis_recovers_on_a_volume() {
    let home = Home::shared();
    let volume = Volume::new(home);
    let mount = format!("{}:/data", volume.1);
    let serve = "exec redis-server --dir /data --appendonly yes --appendfsync always \
                 --unixsocket /tmp/socket --port 0 --save ''";
    let database = Database {
        vm: home.detached(&["-m", "256m", "-v", &mount, &work(), "bash", "-c", serve]),
        ready: "redis-cli -s /tmp/socket dbsize",
        // The length of the list is what each one prints.
        insert: "seq FIRST 1000000 | sed 's/^/rpush own /' | redis-cli -s /tmp/socket",
        count: "redis-cli -s /tmp/socket lindex own -1; redis-cli -s /tmp/socket llen own",
    };
    database.survives(home);
}

/// Sources of a program of several files.
const PROJECT: &str = r#"
set -e
mkdir project && cd project
for n in $(seq 40); do
    echo "int f$n(int x) { return x + $n; }" > f$n.c
done
{
    echo '#include <stdio.h>'
    for n in $(seq 40); do echo "int f$n(int);"; done
    echo 'int main(void) { int x = 0;'
    for n in $(seq 40); do echo "x = f$n(x);"; done
    echo 'printf("%d\n", x); return 0; }'
} > main.c
printf 'program: %s main.o\n\tgcc -o $@ $^\n%%.o: %%.c\n\tgcc -c -o $@ $<\n' \
    "$(for n in $(seq 40); do printf 'f%s.o ' $n; done)" > Makefile
printf '*.o\nprogram\n' > .gitignore
git init -q . && git add . && git -c user.name=n -c user.email=e commit -qm first
"#;

#[test]
fn full_a_project_is_cloned_and_built_in_a_directory_of_the_host() {
    let home = Home::shared();
    let folder = tempfile::tempdir().unwrap();
    chown(folder.path(), Some(1000), Some(1000)).unwrap();
    let mount = format!("{}:/project", folder.path().display());
    let options = [
        "-m",
        "512m",
        "-v",
        &mount,
        "-w",
        "/project",
        "-u",
        "1000:1000",
    ];
    let image = work();
    let options = [
        &options[..],
        &["-e", "HOME=/tmp", &image, "sleep", "100000"],
    ]
    .concat();
    let vm = home.detached(&options);
    let sh = |script: &str| vm.exec(&["bash", "-c", script]).exits(0).out();
    sh(PROJECT);
    let build = "set -e
        git clone -q project clone && cd clone && make -s -j2 && ./program
        git status --porcelain && git gc -q && git fsck --strict 2>&1 && git log --format=%s
        make -q && echo up to date";
    let out = sh(build);
    assert_eq!(out, "820\nfirst\nup to date\n");
    let clone = folder.path().join("clone");
    for (name, mode) in [("program", 0o111), ("f7.o", 0), ("main.c", 0)] {
        let metadata = clone.join(name).metadata().unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1000, 1000), "{name}");
        assert_eq!(metadata.permissions().mode() & 0o111, mode, "{name}");
    }
    // An edit of the host is built, and nothing else.
    fs::write(
        clone.join("f7.c"),
        "int f7(int x) { return x + 7 + 1000; }\n",
    )
    .unwrap();
    until("the guest sees the edit", || {
        vm.exec(&["make", "-q", "-C", "/project/clone"]).code == Some(1)
    });
    let out = sh("cd clone && make | grep -c -- ' -c ' && ./program && git status --porcelain");
    assert_eq!(out, "1\n1820\n M f7.c\n");
}

#[test]
fn full_sqlite_writes_ahead_in_a_directory_of_the_host() {
    let home = Home::shared();
    let folder = tempfile::tempdir().unwrap();
    let mount = format!("{}:/project", folder.path().display());
    let options = ["-m", "256m", "-v", &mount, "-w", "/project"];
    let vm = home.detached(&[&options[..], &[&work(), "sleep", "100000"]].concat());
    let script = "set -e
        sqlite3 db 'pragma journal_mode=wal; create table t (n integer)'
        add() { for n in $(seq 25); do sqlite3 -cmd '.timeout 60000' db \"insert into t values ($1)\"; done; }
        add 1 & add 2 & add 3 & wait
        sqlite3 db 'select n, count(*) from t group by n; pragma integrity_check'";
    let out = vm.exec(&["bash", "-c", script]).exits(0).out();
    assert_eq!(out, "wal\n1|25\n2|25\n3|25\nok\n");
}

#[test]
fn full_a_root_is_kept_over_20_starts() {
    let home = Home::shared();
    let script = "n=$(cat /counter 2>/dev/null || echo 0); n=$((n + 1)); echo $n > /counter
        mkdir -p /kept && echo $n > /kept/$n && echo start $n && sleep 100000";
    let vm = home.detached(&["-m", "128m", &image("busybox"), "sh", "-c", script]);
    for n in 1..=20 {
        vm.until_it_says(&format!("start {n}\n"));
        // An end by itself, by a signal, and by the loss of its process.
        match n % 3 {
            0 => home.sm(&["stop", "-t", "0", &vm.name]),
            1 => home.sm(&["kill", &vm.name]),
            _ => home.sm(&["restart", "-t", "0", &vm.name]),
        }
        .exits(0);
        if n % 3 != 2 {
            until("it can be started", || {
                home.sm(&["start", &vm.name]).code == Some(0)
            });
        }
    }
    vm.until_it_says("start 21\n");
    let out = vm.exec(&["sh", "-c", "ls /kept | wc -l; cat /kept/13"]);
    assert_eq!(out.exits(0).out(), "21\n13\n");
}

/// The body that a web server sends.
fn get(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body);
    body.unwrap_or_default().to_owned()
}

#[test]
fn nginx_serves_a_directory_while_the_host_edits_it() {
    let home = Home::shared();
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("index.html");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(&page, "first\n").unwrap();
    let mount = format!("{}:/var/www/html:ro", folder.path().display());
    let vm = home.detached(&["-m", "128m", "-v", &mount, "-p", "80", &image("nginx")]);
    let address = home.sm(&["port", &vm.name, "80"]).exits(0).out();
    let served = |text: &str| until(text, || get(address.trim()) == text);
    served("first\n");
    // In place, and as editors do it.
    fs::write(&page, "second, longer\n").unwrap();
    served("second, longer\n");
    fs::write(folder.path().join("new"), "third\n").unwrap();
    fs::rename(folder.path().join("new"), &page).unwrap();
    served("third\n");
}
