//! placeholder
use super::guest::*;
use crate::launch::LaunchRequest;
use crate::record::Record;
use crate::timings::Phase;
pub(crate) struct RunningMachine;
impl Guest for RunningMachine {
    fn connect(&mut self, _port: u32) -> std::io::Result<std::os::unix::net::UnixStream> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    fn pause(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn stop(&mut self) {}
    fn end_event(&self) -> std::os::fd::BorrowedFd<'_> {
        loop {}
    }
    fn end(&self) -> Option<GuestEnd> {
        None
    }
}
pub(crate) fn start(
    _r: &LaunchRequest,
    _rec: &Record,
    _c: std::fs::File,
    _d: DialSender,
) -> Result<(RunningMachine, Vec<Phase>), String> {
    Err("no machine yet".into())
}
