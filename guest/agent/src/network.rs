//! The network interface of the guest.
//!
//! Each refresh replaces its addresses, routes and neighbours before any process of the
//! workload continues. The workload may have changed all of it, and renamed the interface,
//! moved it to another network namespace or unbound its driver: the interface is found by its
//! device and not by its name, and one that cannot be configured is replaced by a new one.
//! Other state of the workload (rules, tunnels, bridges, filters) is its own and remains.

mod config;
mod device;
mod netlink;

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use rustix::io::Errno;
use thiserror::Error;

pub(crate) use self::config::{NetworkConfig, parse_mac};
use self::device::Interface;
pub(crate) use self::device::NetDevice;
use self::netlink::{LinkEvents, NetlinkSocket};
use crate::log;

/// Maximum number of addresses that are removed one by one.
const MAX_OLD: usize = 64;

/// Timeout for the link of the device.
const LINK_DEADLINE: Duration = Duration::from_secs(1);

/// Failure to configure the network.
#[derive(Debug, Error)]
pub(crate) enum NetworkError {
    #[error("the machine has no network device")]
    NoDevice,
    #[error("{operation} of the network device: {cause}")]
    Device {
        operation: &'static str,
        cause: io::Error,
    },
    #[error("{operation}: {cause}")]
    Step {
        operation: &'static str,
        cause: io::Error,
    },
    #[error("too many addresses of the network interface")]
    Crowded,
}

/// Gives the guest the network of `config`, or none.
pub(crate) fn apply(
    device: Option<&NetDevice>,
    config: Option<&NetworkConfig>,
) -> Result<(), NetworkError> {
    let failed = |operation| move |cause| NetworkError::Device { operation, cause };
    let (device, config) = match (device, config) {
        (None, None) => return Ok(()),
        (None, Some(_)) => return Err(NetworkError::NoDevice),
        (Some(device), None) => return device.unbind().map_err(failed("unbind the driver")),
        (Some(device), Some(config)) => (device, config),
    };
    if let Some(interface) = device.interface().map_err(failed("find the interface"))? {
        match configure(&interface, config) {
            Ok(()) => return await_link(device, &interface),
            Err(error) => log::error("configure the network interface, which is replaced", error),
        }
    }
    device.unbind().map_err(failed("unbind the driver"))?;
    let interface = device.bind().map_err(failed("bind the driver"))?;
    configure(&interface, config)?;
    await_link(device, &interface)
}

/// Waits until packets can be sent, if the device has a link only since a moment ago: they
/// would be lost without a trace.
fn await_link(device: &NetDevice, interface: &Interface) -> Result<(), NetworkError> {
    let has_link = || device.has_link(interface);
    let waited = match has_link() {
        true => Ok(true),
        false => LinkEvents::open().and_then(|events| events.wait(has_link, LINK_DEADLINE)),
    };
    match waited {
        Ok(true) => {}
        Ok(false) => log::line(4, "the network device has no link"),
        Err(error) => log::error("wait for the link of the network device", error),
    }
    Ok(())
}

/// Returns the MAC address and the addresses of the interface; `None` if there is none.
pub(crate) fn report(device: &NetDevice) -> io::Result<Option<(String, Vec<IpAddr>)>> {
    let Some(interface) = device.interface()? else {
        return Ok(None);
    };
    let mac = device.mac(&interface)?;
    let found = NetlinkSocket::open()?.addresses(interface.index, MAX_OLD)?;
    let addresses = found.unwrap_or_default().into_iter();
    Ok(Some((mac, addresses.map(|found| found.address).collect())))
}

/// Replaces the configuration of an interface by `config`.
fn configure(interface: &Interface, config: &NetworkConfig) -> Result<(), NetworkError> {
    let failed = |operation| move |cause| NetworkError::Step { operation, cause };
    let mut socket = NetlinkSocket::open().map_err(failed("open a netlink socket"))?;
    let old = socket.addresses(interface.index, MAX_OLD);
    let old = old.map_err(failed("list addresses"))?;
    let old = old.ok_or(NetworkError::Crowded)?;
    let (batch, steps) = config.requests(interface.index, &old);
    let errors = socket
        .perform(batch)
        .map_err(failed("send netlink requests"))?;
    let mut without_ipv6 = false;
    for (number, cause) in errors {
        let step = usize::try_from(number)
            .ok()
            .and_then(|number| steps.get(number));
        let Some(step) = step else {
            continue;
        };
        // The guest's kernel has no IPv6, or its workload has switched it off.
        without_ipv6 |=
            step.is_ipv6 && matches!(cause, Errno::ACCESS | Errno::OPNOTSUPP | Errno::AFNOSUPPORT);
        if step.may_fail || (step.is_ipv6 && without_ipv6) {
            continue;
        }
        return Err(failed(step.operation)(cause.into()));
    }
    if without_ipv6 {
        log::line(4, "the guest has no IPv6");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
