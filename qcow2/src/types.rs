//! Offsets and cluster numbers as types of their own, so that mixing guest and host does not
//! compile.

use std::fmt;
use std::ops::Add;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub(crate) struct $name(pub(crate) u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl Add<u64> for $name {
            type Output = Self;
            fn add(self, rhs: u64) -> Self {
                Self(self.0 + rhs)
            }
        }
    };
}

unit! {
    /// A byte of the virtual disk.
    GuestOffset
}
unit! {
    /// A byte of the image file.
    HostOffset
}
unit! {
    /// Number of a cluster of the virtual disk.
    GuestCluster
}
unit! {
    /// Number of a cluster of the image file.
    HostCluster
}
