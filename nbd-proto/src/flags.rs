//! Flag words of the protocol.

macro_rules! flags {
    ($(#[$doc:meta])* $name:ident : $repr:ty { $($(#[$fdoc:meta])* $flag:ident = $bit:expr,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub $repr);

        impl $name {
            $($(#[$fdoc])* pub const $flag: Self = Self(1 << $bit);)*

            /// No flag.
            pub const fn empty() -> Self {
                Self(0)
            }

            /// Whether every flag of `other` is set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The flags of both.
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// The flags without those of `other`.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// `other`'s flags where `condition` holds, besides the own ones.
            #[must_use]
            pub const fn with_if(self, condition: bool, other: Self) -> Self {
                if condition { self.with(other) } else { self }
            }
        }
    };
}

flags! {
    /// What an export can do ("Transmission flags").
    TransmissionFlags: u16 {
        /// `NBD_FLAG_HAS_FLAGS`: always set.
        HAS_FLAGS = 0,
        /// `NBD_FLAG_READ_ONLY`
        READ_ONLY = 1,
        /// `NBD_FLAG_SEND_FLUSH`
        SEND_FLUSH = 2,
        /// `NBD_FLAG_SEND_FUA`
        SEND_FUA = 3,
        /// `NBD_FLAG_ROTATIONAL`
        ROTATIONAL = 4,
        /// `NBD_FLAG_SEND_TRIM`
        SEND_TRIM = 5,
        /// `NBD_FLAG_SEND_WRITE_ZEROES`
        SEND_WRITE_ZEROES = 6,
        /// `NBD_FLAG_SEND_DF`
        SEND_DF = 7,
        /// `NBD_FLAG_CAN_MULTI_CONN`
        CAN_MULTI_CONN = 8,
        /// `NBD_FLAG_SEND_CACHE`
        SEND_CACHE = 10,
        /// `NBD_FLAG_SEND_FAST_ZERO`
        SEND_FAST_ZERO = 11,
        /// `NBD_FLAG_BLOCK_STAT_PAYLOAD`
        BLOCK_STAT_PAYLOAD = 12,
    }
}

flags! {
    /// Flags of a request ("Command flags").
    CommandFlags: u16 {
        /// `NBD_CMD_FLAG_FUA`
        FUA = 0,
        /// `NBD_CMD_FLAG_NO_HOLE`
        NO_HOLE = 1,
        /// `NBD_CMD_FLAG_DF`
        DF = 2,
        /// `NBD_CMD_FLAG_REQ_ONE`
        REQ_ONE = 3,
        /// `NBD_CMD_FLAG_FAST_ZERO`
        FAST_ZERO = 4,
        /// `NBD_CMD_FLAG_PAYLOAD_LEN`
        PAYLOAD_LEN = 5,
    }
}

flags! {
    /// Flags of a structured or extended reply chunk.
    ReplyFlags: u16 {
        /// `NBD_REPLY_FLAG_DONE`: the last chunk.
        DONE = 0,
    }
}

flags! {
    /// State of an extent in `base:allocation`.
    ExtentState: u32 {
        /// `NBD_STATE_HOLE`
        HOLE = 0,
        /// `NBD_STATE_ZERO`
        ZERO = 1,
    }
}

/// `NBD_FLAG_FIXED_NEWSTYLE`, from the server.
pub(crate) const FIXED_NEWSTYLE: u16 = 1;
/// `NBD_FLAG_NO_ZEROES`, from the server.
pub(crate) const NO_ZEROES: u16 = 2;
/// `NBD_FLAG_C_FIXED_NEWSTYLE`, from the client.
pub(crate) const CLIENT_FIXED_NEWSTYLE: u32 = 1;
/// `NBD_FLAG_C_NO_ZEROES`, from the client.
pub(crate) const CLIENT_NO_ZEROES: u32 = 2;
