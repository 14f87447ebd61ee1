//! Options and commands of Docker that do not exist here: the reason, and what to do instead.

use clap::error::{ContextKind, ContextValue, ErrorKind};

const KERNEL: &str = "a VM has a kernel of its own, and shares no namespaces with the host";
const LIMITS: &str = "the limits of a VM are its memory (-m) and its processors (--cpus); other \
                      limits can be set for the process that --pid-file names";
const NETWORK: &str = "VMs are in no common network: publish ports of the guest with -p";
const HARDWARE: &str = "a guest reaches no hardware of the host";
const LOGS: &str = "output is always in the log of the VM, which \"sm logs\" shows";
const STREAMS: &str = "all streams are attached unless -d is given";
const TAGS: &str = "name the tags one by one";

/// Returns the sentence for an invalid command line, if it is one for Docker.
pub(crate) fn reason(command: Option<&str>, error: &clap::Error) -> Option<String> {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::UnknownArgument => {
            let option = context(ContextKind::InvalidArg)?;
            let option = option.split_once('=').map_or(option, |(name, _)| name);
            let reason = of_option(command?, option)?;
            Some(format!("there is no option {option}: {reason}"))
        }
        ErrorKind::InvalidSubcommand => {
            let command = context(ContextKind::InvalidSubcommand)?;
            let reason = of_command(command)?;
            Some(format!("there is no command \"{command}\": {reason}"))
        }
        _ => None,
    }
}

fn of_option(command: &str, option: &str) -> Option<&'static str> {
    Some(match (command, option) {
        ("run" | "create", _) => return of_run(option),
        ("exec" | "attach" | "start", "--detach-keys") => "the keys are always ctrl-p ctrl-q",
        ("attach", "--sig-proxy") => "signals are forwarded; add --no-stdin to send no input",
        ("stop" | "restart", "-s" | "--signal") => {
            "set the signal with --stop-signal when the VM is created, or send one with \
             \"sm kill -s\""
        }
        ("update", _) if of_run(option) == Some(LIMITS) => LIMITS,
        ("update", "--cpus") => "a VM has as many processors as it was created with",
        ("ps", "-s" | "--size") => "\"sm system df\" shows the space that VMs take",
        ("inspect", "-s" | "--size" | "--type") => {
            "\"sm inspect\" shows VMs, \"sm image inspect\" images, \"sm system df\" sizes"
        }
        ("logs", "--details") => "the log has no attributes",
        ("rm", "-l" | "--link") => "VMs have no links",
        ("pull" | "push", "-a" | "--all-tags") => TAGS,
        ("pull" | "push", "--disable-content-trust") => {
            "signatures are not checked; an image is identified by its digest"
        }
        ("stats", "-a" | "--all") => "only running VMs have figures",
        _ => return None,
    })
}

fn of_run(option: &str) -> Option<&'static str> {
    Some(match option {
        "--ipc" | "--pid" | "--uts" | "--userns" | "--cgroupns" | "--runtime" | "--isolation" => {
            KERNEL
        }
        "-c"
        | "--cpu-shares"
        | "--cpu-period"
        | "--cpu-quota"
        | "--cpu-rt-period"
        | "--cpu-rt-runtime"
        | "--cpuset-cpus"
        | "--cpuset-mems"
        | "--cpu-count"
        | "--cpu-percent"
        | "--cgroup-parent"
        | "--blkio-weight"
        | "--blkio-weight-device"
        | "--device-read-bps"
        | "--device-write-bps"
        | "--device-read-iops"
        | "--device-write-iops"
        | "--io-maxbandwidth"
        | "--io-maxiops"
        | "--memory-swap"
        | "--memory-swappiness"
        | "--memory-reservation"
        | "--kernel-memory"
        | "--pids-limit"
        | "--oom-kill-disable"
        | "--oom-score-adj" => LIMITS,
        "--net-alias" | "--network-alias" | "--link" | "--link-local-ip" | "--ip" | "--ip6" => {
            NETWORK
        }
        "--gpus" | "--device-cgroup-rule" => HARDWARE,
        "--log-driver" | "--log-opt" => LOGS,
        "-a" | "--attach" => STREAMS,
        "-P" | "--publish-all" => {
            "-p auto publishes the first port on which the guest listens, -p PORT any other"
        }
        "--expose" => "-p publishes any port of the guest",
        "--sig-proxy" => "signals are always forwarded to a command in the foreground",
        "--detach-keys" => "the keys are always ctrl-p ctrl-q",
        "--domainname" => "write the whole name with --hostname",
        "--health-start-interval" => "checks have one interval, --health-interval",
        "--annotation" => "describe a VM with --label",
        "--volume-driver" => "volumes are on this host",
        "--disable-content-trust" => {
            "signatures are not checked; an image is identified by its digest"
        }
        "-q" | "--quiet" => "pull the image with \"sm pull -q\" first",
        _ => return None,
    })
}

fn of_command(command: &str) -> Option<&'static str> {
    Some(match command {
        "build" | "buildx" | "builder" => {
            "sm builds no images; build one with buildah, podman or docker and run it from where \
             it is, or change a VM and use \"sm commit\""
        }
        "compose" | "stack" | "service" | "swarm" | "node" | "secret" | "config" => {
            "sm runs single VMs; start each one with \"sm run\""
        }
        "network" => NETWORK,
        "login" | "logout" => {
            "sm uses the passwords that \"docker login\" and \"podman login\" have stored"
        }
        "search" => "registries are searched in a browser",
        "container" => "leave the word out: its commands are those of sm itself",
        "info" => "write \"sm system info\"",
        "context" | "plugin" | "trust" | "checkpoint" | "manifest" => {
            "see the table of Docker's commands in the documentation"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(line: &str) -> Option<String> {
        let words: Vec<&str> = line.split(' ').collect();
        let error = crate::check(&words).unwrap_err();
        reason(words.get(1).copied(), &error)
    }

    #[test]
    fn dockers_options_are_refused_with_a_reason() {
        for (line, words) in [
            ("sm run --gpus all x", "no hardware"),
            (
                "sm run --ipc=host x",
                "there is no option --ipc: a VM has a kernel",
            ),
            ("sm run --pids-limit 5 x", "(--cpus)"),
            ("sm create -P x", "-p auto"),
            ("sm exec --detach-keys x web true", "ctrl-p"),
            ("sm stop --signal INT web", "--stop-signal"),
            ("sm update --cpu-shares 5 web", "(--cpus)"),
            ("sm update --cpus 2 web", "was created"),
            ("sm pull --all-tags x", "one by one"),
            ("sm build .", "sm builds no images"),
            ("sm container ls", "leave the word out"),
        ] {
            let told = told(line).unwrap_or_default();
            assert!(told.contains(words), "{line}: {told}");
        }
        for line in ["sm run --flie x", "sm fly", "sm stop --gpus web", "sm run"] {
            assert_eq!(told(line), None, "{line}");
        }
    }

    #[test]
    fn no_option_that_exists_has_a_reason() {
        let command = crate::command();
        for sub in command.get_subcommands() {
            for argument in sub.get_arguments() {
                let long = argument.get_long().map(|long| format!("--{long}"));
                let short = argument.get_short().map(|short| format!("-{short}"));
                for option in long.into_iter().chain(short) {
                    let reason = of_option(sub.get_name(), &option);
                    assert_eq!(
                        reason, None,
                        "{option} exists now: remove it from this file"
                    );
                }
            }
            assert_eq!(of_command(sub.get_name()), None);
        }
    }
}
