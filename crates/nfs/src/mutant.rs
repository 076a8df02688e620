//! Mended faults of this crate that a test can put back (the crate `mutants` says how).

mutants::list! {
    /// A connection that gets no answer from its source port is tried from that port for ever.
    SilentPortKept,
    /// Connections without calls stay open and keep their source ports.
    IdleStaysOpen,
    /// The daemon takes as much memory as a length in a server's answer announces.
    LengthsTrusted,
    /// A directory of a server without READDIRPLUS cannot be listed.
    ReaddirplusOnly,
    /// Two handles are taken for two files when it is looked whether a repeated LINK or RENAME had
    /// been carried out.
    HandlesAreFiles,
    /// What a server has answered before a connection takes no more calls is not read any more.
    WriteErrorsLoseReplies,
    /// A server that does not answer for version 3 is not asked for version 4.
    SilenceIsForAll,
}
