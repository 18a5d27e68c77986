//! The numbers of the protocol ("Values").

/// Magic numbers.
pub mod magic {
    /// First greeting of the server: `NBDMAGIC`.
    pub const INIT: u64 = 0x4e42_444d_4147_4943;
    /// Second greeting of the server, and start of each option: `IHAVEOPT`.
    pub const OPTION: u64 = 0x4948_4156_454f_5054;
    /// Start of each reply to an option.
    pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
    /// Start of a compact request.
    pub const REQUEST: u32 = 0x2560_9513;
    /// Start of an extended request.
    pub const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
    /// Start of a simple reply.
    pub const SIMPLE_REPLY: u32 = 0x6744_6698;
    /// Start of a structured reply chunk.
    pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
    /// Start of an extended reply chunk.
    pub const EXTENDED_REPLY: u32 = 0x6e8a_278c;
}

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident : $repr:ty { $($(#[$vdoc:meta])* $variant:ident = $value:expr,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr($repr)]
        pub enum $name {
            $($(#[$vdoc])* $variant = $value,)*
        }

        impl $name {
            /// The code with this number, if there is one.
            pub fn from_code(code: $repr) -> Option<Self> {
                match code {
                    $(c if c == $value => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The number on the wire.
            pub fn code(self) -> $repr {
                self as $repr
            }
        }
    };
}

codes! {
    /// Options of the haggling phase ("Option types").
    OptionCode: u32 {
        /// `NBD_OPT_EXPORT_NAME`
        ExportName = 1,
        /// `NBD_OPT_ABORT`
        Abort = 2,
        /// `NBD_OPT_LIST`
        List = 3,
        /// `NBD_OPT_STARTTLS`
        StartTls = 5,
        /// `NBD_OPT_INFO`
        Info = 6,
        /// `NBD_OPT_GO`
        Go = 7,
        /// `NBD_OPT_STRUCTURED_REPLY`
        StructuredReply = 8,
        /// `NBD_OPT_LIST_META_CONTEXT`
        ListMetaContext = 9,
        /// `NBD_OPT_SET_META_CONTEXT`
        SetMetaContext = 10,
        /// `NBD_OPT_EXTENDED_HEADERS`
        ExtendedHeaders = 11,
    }
}

codes! {
    /// Replies to options ("Option reply types").
    OptionReply: u32 {
        /// `NBD_REP_ACK`
        Ack = 1,
        /// `NBD_REP_SERVER`
        Server = 2,
        /// `NBD_REP_INFO`
        Info = 3,
        /// `NBD_REP_META_CONTEXT`
        MetaContext = 4,
        /// `NBD_REP_ERR_UNSUP`
        ErrUnsup = 0x8000_0001,
        /// `NBD_REP_ERR_POLICY`
        ErrPolicy = 0x8000_0002,
        /// `NBD_REP_ERR_INVALID`
        ErrInvalid = 0x8000_0003,
        /// `NBD_REP_ERR_PLATFORM`
        ErrPlatform = 0x8000_0004,
        /// `NBD_REP_ERR_TLS_REQD`
        ErrTlsReqd = 0x8000_0005,
        /// `NBD_REP_ERR_UNKNOWN`
        ErrUnknown = 0x8000_0006,
        /// `NBD_REP_ERR_SHUTDOWN`
        ErrShutdown = 0x8000_0007,
        /// `NBD_REP_ERR_BLOCK_SIZE_REQD`
        ErrBlockSizeReqd = 0x8000_0008,
        /// `NBD_REP_ERR_TOO_BIG`
        ErrTooBig = 0x8000_0009,
        /// `NBD_REP_ERR_EXT_HEADER_REQD`
        ErrExtHeaderReqd = 0x8000_000a,
    }
}

codes! {
    /// Information about an export (`NBD_REP_INFO`).
    InfoType: u16 {
        /// `NBD_INFO_EXPORT`
        Export = 0,
        /// `NBD_INFO_NAME`
        Name = 1,
        /// `NBD_INFO_DESCRIPTION`
        Description = 2,
        /// `NBD_INFO_BLOCK_SIZE`
        BlockSize = 3,
    }
}

codes! {
    /// Commands of the transmission phase ("Request types").
    CommandType: u16 {
        /// `NBD_CMD_READ`
        Read = 0,
        /// `NBD_CMD_WRITE`
        Write = 1,
        /// `NBD_CMD_DISC`
        Disc = 2,
        /// `NBD_CMD_FLUSH`
        Flush = 3,
        /// `NBD_CMD_TRIM`
        Trim = 4,
        /// `NBD_CMD_CACHE`
        Cache = 5,
        /// `NBD_CMD_WRITE_ZEROES`
        WriteZeroes = 6,
        /// `NBD_CMD_BLOCK_STATUS`
        BlockStatus = 7,
    }
}

codes! {
    /// Types of structured and extended reply chunks ("Structured reply types").
    ReplyType: u16 {
        /// `NBD_REPLY_TYPE_NONE`
        None = 0,
        /// `NBD_REPLY_TYPE_OFFSET_DATA`
        OffsetData = 1,
        /// `NBD_REPLY_TYPE_OFFSET_HOLE`
        OffsetHole = 2,
        /// `NBD_REPLY_TYPE_BLOCK_STATUS`
        BlockStatus = 5,
        /// `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`
        BlockStatusExt = 6,
        /// `NBD_REPLY_TYPE_ERROR`
        Error = 0x8001,
        /// `NBD_REPLY_TYPE_ERROR_OFFSET`
        ErrorOffset = 0x8002,
    }
}
