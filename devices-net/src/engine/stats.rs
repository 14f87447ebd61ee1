//! Counters of an engine.

/// Counters since an engine was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Frames of the guest.
    pub frames_from_guest: u64,
    /// Bytes of these, headers included.
    pub bytes_from_guest: u64,
    /// Frames for the guest.
    pub frames_to_guest: u64,
    /// Bytes of these, headers included.
    pub bytes_to_guest: u64,
    /// Frames of the guest that were not understood.
    pub malformed: u64,
    /// Packets of the guest with addresses that are not its own, or that none can reach.
    pub misaddressed: u64,
    /// Packets of the guest of transports other than TCP, UDP and ICMP echo.
    pub unsupported: u64,
    /// Frames that the link had no room for; those of TCP were sent later.
    pub link_full: u64,
    /// Flows that the policy prohibited.
    pub prohibited: u64,
    /// Flows that a limit prevented, or ended.
    pub limited: u64,
    /// TCP flows that exist now.
    pub tcp_flows: u64,
    /// TCP flows that connected.
    pub tcp_connected: u64,
    /// TCP flows whose host socket did not connect.
    pub tcp_failed: u64,
    /// Times that segments of TCP flows were sent again.
    pub tcp_retransmissions: u64,
    /// Segments of the guest that had a gap before them.
    pub tcp_gaps: u64,
    /// Bytes of TCP flows that the guest has sent.
    pub tcp_bytes_from_guest: u64,
    /// Bytes of TCP flows for the guest, those that were sent again included.
    pub tcp_bytes_to_guest: u64,
    /// UDP flows that exist now.
    pub udp_flows: u64,
    /// Datagrams of the guest that were sent.
    pub udp_from_guest: u64,
    /// Datagrams that were delivered to the guest.
    pub udp_to_guest: u64,
    /// Datagrams of the guest that were not sent.
    pub udp_dropped: u64,
    /// Datagrams and echo requests that came in fragments, and are complete.
    pub reassembled: u64,
    /// Fragments that were dropped.
    pub fragments_dropped: u64,
    /// Questions to the guest's name server.
    pub dns_questions: u64,
    /// Questions that a stored answer has answered.
    pub dns_stored: u64,
    /// Echo requests that were sent.
    pub echoes: u64,
}
