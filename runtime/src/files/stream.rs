//! Results of operations, as they arrive.

use std::io::{self, BufRead as _, BufReader, Read};
use std::marker::PhantomData;

use serde::de::DeserializeOwned;
use sm_control::session::{Event, Session, SessionWriter};
use sm_guest_proto::exec::ExecControl;
use sm_guest_proto::files::{FileRequest, MAX_LINE};
use sm_guest_proto::frame::BULK_PAYLOAD;

use super::error::{FilesError, of_reader};
use crate::Error;
use crate::exec::start_session;
use crate::record::Record;

/// Maximum length of a sentence of the guest in bytes.
const MAX_MESSAGE: usize = 4096;

/// Reads the result of an operation. An operation that fails ends with an error; dropping
/// the reader cancels it.
#[derive(Debug)]
pub struct GuestReader {
    session: Session,
    /// Bytes that have arrived, of which the first `taken` were read.
    arrived: Vec<u8>,
    taken: usize,
    /// The guest's sentence about a failure.
    message: Vec<u8>,
    ended: bool,
}

impl GuestReader {
    /// Sends a request to the guest of `record`.
    pub(super) fn start(record: &Record, request: FileRequest) -> Result<Self, Error> {
        let message = ExecControl::Files(request);
        let session = start_session(record, "send the request to the VM", |writer| {
            writer.send_json(sm_guest_proto::frame::FrameType::Control, &message)
        })?;
        Ok(Self {
            session,
            arrived: Vec::new(),
            taken: 0,
            message: Vec::new(),
            ended: false,
        })
    }

    /// Returns the sender of the operation's input.
    pub(super) fn writer(&self) -> SessionWriter {
        self.session.writer()
    }

    /// Sends `input` to the operation, and waits for its end.
    pub(super) fn send(self, mut input: impl Read) -> Result<(), Error> {
        let writer = self.session.writer();
        let mut chunk = vec![0; BULK_PAYLOAD];
        loop {
            let count = match input.read(&mut chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The operation is cancelled, so that it does not take a part for the whole.
                Err(error) => return Err(input_failure(error).into()),
                Ok(count) => count,
            };
            let bytes = chunk.get(..count).unwrap_or_default();
            // The operation may have failed, for the reason that it has sent.
            if bytes.is_empty() || writer.write_stdin(bytes).is_err() {
                break;
            }
        }
        let _ = writer.close_stdin();
        self.finish()
    }

    /// Waits for the end of an operation whose result is of no interest.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        io::copy(&mut self, &mut io::sink())
            .map(drop)
            .map_err(|error| of_reader(error).into())
    }

    /// Waits for more bytes; false at the end.
    fn receive(&mut self) -> Result<bool, FilesError> {
        while !self.ended {
            match self.session.next_event().map_err(FilesError::Connection)? {
                Some(Event::Stdout(bytes)) => {
                    self.arrived.clear();
                    self.arrived.extend_from_slice(bytes);
                    self.taken = 0;
                    return Ok(true);
                }
                Some(Event::Stderr(bytes)) => {
                    let room = MAX_MESSAGE.saturating_sub(self.message.len());
                    let bytes = bytes.get(..room).unwrap_or(bytes);
                    self.message.extend_from_slice(bytes);
                }
                Some(Event::Error(text)) => {
                    self.message = text.into_bytes();
                    self.message.truncate(MAX_MESSAGE);
                }
                Some(Event::Exit(status)) => {
                    self.ended = true;
                    return self.check(status);
                }
                Some(_) => {}
                None => {
                    let error = io::ErrorKind::UnexpectedEof;
                    return Err(FilesError::Connection(error.into()));
                }
            }
        }
        Ok(false)
    }

    fn check(&self, status: u32) -> Result<bool, FilesError> {
        if status == 0 {
            return Ok(false);
        }
        let errno = i32::try_from(status).ok().filter(|errno| *errno < 123);
        let kind = errno.map_or(io::ErrorKind::Other, |errno| {
            io::Error::from_raw_os_error(errno).kind()
        });
        let message = match self.message.as_slice() {
            b"" => format!("the operation ended in the guest with status {status}"),
            message => printable(&String::from_utf8_lossy(message)),
        };
        Err(FilesError::Guest { kind, message })
    }
}

fn input_failure(error: io::Error) -> FilesError {
    match error.downcast() {
        Ok(error) => error,
        Err(error) => FilesError::Input(error),
    }
}

/// Replaces control characters, so that text of a guest cannot control a terminal.
fn printable(text: &str) -> String {
    let shown = |character: char| match character.is_control() {
        true => char::REPLACEMENT_CHARACTER,
        false => character,
    };
    text.chars().map(shown).collect()
}

impl Read for GuestReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while self.taken >= self.arrived.len() {
            if !self.receive()? {
                return Ok(0);
            }
        }
        let rest = self.arrived.get(self.taken..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..count), rest.get(..count)) {
            to.copy_from_slice(from);
        }
        self.taken += count;
        Ok(count)
    }
}

/// Iterates over the items of a result.
#[derive(Debug)]
pub struct GuestLines<T> {
    reader: BufReader<GuestReader>,
    ended: bool,
    items: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> GuestLines<T> {
    pub(super) fn new(reader: GuestReader) -> Self {
        Self {
            reader: BufReader::new(reader),
            ended: false,
            items: PhantomData,
        }
    }

    fn item(&mut self) -> Result<Option<T>, FilesError> {
        let mut line = Vec::new();
        let most = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
        let read = (&mut self.reader).take(most).read_until(b'\n', &mut line);
        read.map_err(of_reader)?;
        match line.last() {
            None => Ok(None),
            Some(b'\n') => serde_json::from_slice(&line).map(Some).map_err(|error| {
                FilesError::Answer(format!("a line that does not parse ({error})"))
            }),
            Some(_) => Err(FilesError::Answer("a line that does not end".to_owned())),
        }
    }
}

impl<T: DeserializeOwned> Iterator for GuestLines<T> {
    type Item = Result<T, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let item = self.item().transpose();
        self.ended = !matches!(item, Some(Ok(_)));
        item.map(|item| item.map_err(Error::from))
    }
}
