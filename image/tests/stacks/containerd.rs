//! Containerd's applier, run in a containerd of the test's own.
//!
//! The layers of many stacks are imported with one `ctr images import`. Each is then
//! applied by a call of containerd's Diff service (api/services/diff/v1/diff.proto) to a
//! plain directory, which is given as a bind mount. A snapshotter would apply it to a
//! copy of the lower layers, which loses hard links of links and devices. `curl` makes
//! the calls, because `ctr` has no command for them; one process makes all calls of a
//! batch.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use sm_image::{Compression, Config, LayoutBuilder};

use crate::compare::{Refusal, Stack};
use crate::programs::{output, start};
use crate::tree::{self, Tree};

const LAYER: &[u8] = b"application/vnd.oci.image.layer.v1.tar";

pub(crate) struct Containerd {
    directory: PathBuf,
    process: Child,
}

impl Containerd {
    /// Starts a containerd with all its files below `directory`.
    pub(crate) fn start(directory: &Path) -> Self {
        let at = directory.display();
        let config = format!(
            "version = 2\nroot = '{at}/root'\nstate = '{at}/state'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.internal.v1.opt', \
             'io.containerd.internal.v1.tracing', 'io.containerd.snapshotter.v1.btrfs', \
             'io.containerd.snapshotter.v1.devmapper']\n\
             [grpc]\naddress = '{at}/socket'\n[ttrpc]\naddress = '{at}/socket.ttrpc'\n"
        );
        let path = directory.join("config.toml");
        fs::write(&path, config).unwrap();
        // It is killed when this thread ends, even if the thread is killed.
        let mut process = start(
            Command::new("setpriv")
                .args(["--pdeathsig", "KILL", "containerd", "--config"])
                .arg(&path)
                .stdin(Stdio::null())
                .stderr(Stdio::piped()),
        );
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut said = String::new();
        loop {
            let line = lines
                .next()
                .unwrap_or_else(|| panic!("containerd did not start: {said}"))
                .unwrap();
            said.push_str(&line);
            said.push('\n');
            if line.contains("containerd successfully booted") {
                break;
            }
        }
        // A full pipe would block it.
        thread::spawn(move || lines.for_each(drop));
        Self {
            directory: directory.to_owned(),
            process,
        }
    }

    /// Returns containerd's trees of these stacks.
    pub(crate) fn apply(&self, stacks: &[Stack], work: &Path) -> Vec<Result<Tree, Refusal>> {
        self.import(stacks, work);
        let roots: Vec<_> = (0..stacks.len())
            .map(|number| work.join(format!("containerd-{number}")))
            .collect();
        let mut requests = Requests {
            directory: work,
            socket: self.directory.join("socket"),
            count: 0,
            config: String::new(),
        };
        for (stack, root) in stacks.iter().zip(&roots) {
            fs::create_dir(root).unwrap();
            for layer in &stack.tars {
                requests.push(&apply_request(layer, root));
            }
        }
        let mut answers = requests.send().into_iter();
        let trees = stacks.iter().zip(&roots).map(|(stack, root)| {
            let answers: Vec<_> = answers.by_ref().take(stack.tars.len()).collect();
            let refused = answers.iter().position(Result::is_err);
            match refused {
                Some(layer) => Err(Refusal {
                    layer,
                    text: answers[layer].clone().unwrap_err(),
                }),
                None => Ok(tree::read(root)),
            }
        });
        let trees = trees.collect();
        for root in roots {
            fs::remove_dir_all(root).unwrap();
        }
        trees
    }

    /// Imports the layers of all stacks into the content store as one image. It replaces
    /// the image of the previous batch, whose layers become garbage.
    fn import(&self, stacks: &[Stack], work: &Path) {
        let layout = work.join("all");
        let mut builder = LayoutBuilder::new(&layout, Compression::None).unwrap();
        for layer in stacks.iter().flat_map(|stack| &stack.tars) {
            builder.layer(layer.as_slice()).unwrap();
        }
        builder.finish("latest", Config::default()).unwrap();
        let archive = work.join("all.tar");
        let mut builder = ::tar::Builder::new(File::create(&archive).unwrap());
        builder.append_dir_all(".", &layout).unwrap();
        builder.finish().unwrap();
        let socket = self.directory.join("socket");
        output(
            Command::new("ctr")
                .arg("--address")
                .arg(socket)
                .args(["images", "import", "--no-unpack", "--base-name", "all"])
                .arg(&archive),
        )
        .unwrap();
        fs::remove_file(archive).unwrap();
        fs::remove_dir_all(layout).unwrap();
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Calls that one `curl` makes sequentially.
struct Requests<'a> {
    directory: &'a Path,
    socket: PathBuf,
    count: usize,
    config: String,
}

impl Requests<'_> {
    fn push(&mut self, message: &[u8]) {
        // gRPC frame: uncompressed flag, length.
        let mut body = vec![0];
        body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        body.extend_from_slice(message);
        let path = self.directory.join(format!("request-{}", self.count));
        fs::write(&path, body).unwrap();
        // A distinct host makes curl open a connection for each call: curl 7.88 fails in
        // the second HTTP/2 stream of a connection without TLS.
        self.config.push_str(&format!(
            "{}url = \"http://call-{}/containerd.services.diff.v1.Diff/Apply\"\n\
             http2-prior-knowledge\nunix-socket = \"{}\"\n\
             header = \"content-type: application/grpc\"\nheader = \"te: trailers\"\n\
             header = \"containerd-namespace: default\"\n\
             data-binary = \"@{}\"\ndump-header = \"-\"\noutput = \"/dev/null\"\nsilent\n",
            if self.count == 0 { "" } else { "next\n" },
            self.count,
            self.socket.display(),
            path.display()
        ));
        self.count += 1;
    }

    /// Sends the calls and returns containerd's answers.
    fn send(self) -> Vec<Result<(), String>> {
        let path = self.directory.join("calls");
        fs::write(&path, &self.config).unwrap();
        let headers = output(Command::new("curl").arg("--config").arg(&path)).unwrap();
        let answers: Vec<_> = headers.split("HTTP/2 ").skip(1).map(answer).collect();
        assert_eq!(answers.len(), self.count, "{headers}");
        for number in 0..self.count {
            fs::remove_file(self.directory.join(format!("request-{number}"))).unwrap();
        }
        answers
    }
}

/// Parses the outcome in the headers and trailers of a call.
fn answer(headers: &str) -> Result<(), String> {
    let header = |name: &str| {
        headers
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    match header("grpc-status:") {
        Some("0") => Ok(()),
        // An applier's refusal has the status "unknown".
        Some("2") => Err(header("grpc-message:").unwrap_or_default().to_owned()),
        _ => panic!("containerd answers {headers}"),
    }
}

/// Encodes an `ApplyRequest`: descriptor of the layer, and a bind mount of `root`.
fn apply_request(layer: &[u8], root: &Path) -> Vec<u8> {
    let digest = sm_image::Digest::of(layer).to_string();
    let mut descriptor = Vec::new();
    bytes_field(1, LAYER, &mut descriptor);
    bytes_field(2, digest.as_bytes(), &mut descriptor);
    descriptor.push(3 << 3);
    varint(layer.len(), &mut descriptor);
    let mut mount = Vec::new();
    bytes_field(1, b"bind", &mut mount);
    bytes_field(2, root.as_os_str().as_encoded_bytes(), &mut mount);
    bytes_field(4, b"rbind", &mut mount);
    let mut request = Vec::new();
    bytes_field(1, &descriptor, &mut request);
    bytes_field(2, &mount, &mut request);
    request
}

fn bytes_field(number: u8, bytes: &[u8], to: &mut Vec<u8>) {
    to.push(number << 3 | 2);
    varint(bytes.len(), to);
    to.extend_from_slice(bytes);
}

fn varint(mut number: usize, to: &mut Vec<u8>) {
    while number > 0x7f {
        to.push(0x80 | u8::try_from(number & 0x7f).unwrap());
        number >>= 7;
    }
    to.push(u8::try_from(number).unwrap());
}
