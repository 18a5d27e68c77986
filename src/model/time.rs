//! Points in time, as they are stored and told: UTC, RFC 3339, milliseconds.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Timestamp(jiff::Timestamp);

impl Timestamp {
    /// Now, without fractions of a millisecond: what is stored compares equal.
    pub fn now() -> Self {
        let now = jiff::Timestamp::now();
        Self(jiff::Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now))
    }

    /// Reads RFC 3339.
    ///
    /// # Errors
    /// A sentence where it is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|e| format!("'{text}' is no time in RFC 3339: {e}"))
    }

    /// `YYYYMMDDTHHMMSS`, as names have it.
    pub fn compact(self) -> String {
        self.0.strftime("%Y%m%dT%H%M%S").to_string()
    }

    /// Time since `earlier`; zero where it is later.
    pub fn since(self, earlier: Self) -> Duration {
        let millis = self.0.as_millisecond() - earlier.0.as_millisecond();
        Duration::from_millis(u64::try_from(millis).unwrap_or(0))
    }

    /// The point `time` later; the last one there is where that is none.
    #[must_use]
    pub fn after(self, time: Duration) -> Self {
        Self(self.0.checked_add(time).unwrap_or(jiff::Timestamp::MAX))
    }

    /// So many seconds since 1970, and nanoseconds; nothing where no calendar reaches.
    pub fn at(seconds: i64, nanoseconds: u32) -> Option<Self> {
        let whole = jiff::Timestamp::from_second(seconds).ok()?;
        whole.checked_add(Duration::from_nanos(nanoseconds.into())).ok().map(Self)
    }

    /// Seconds since 1970.
    pub fn unix(self) -> i64 {
        self.0.as_second()
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

impl From<Timestamp> for String {
    fn from(time: Timestamp) -> Self {
        time.to_string()
    }
}

impl TryFrom<String> for Timestamp {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_survives_its_text_and_sorts_as_text_does() {
        let now = Timestamp::now();
        assert_eq!(Timestamp::parse(&now.to_string()), Ok(now));
        let later = now.after(Duration::from_millis(1001));
        assert!(later.to_string() > now.to_string());
        assert_eq!(later.since(now), Duration::from_millis(1001));
        assert_eq!(now.since(later), Duration::ZERO);
        assert_eq!(
            Timestamp::parse("2026-11-21T14:05:06.5Z").unwrap().compact(),
            "20261121T140506"
        );
        assert_eq!(Timestamp::parse("2026-11-21T14:05:06Z").unwrap().to_string().len(), 24);
        let before = Timestamp::at(-1, 999_000_000).unwrap();
        assert_eq!(before.to_string(), "1969-12-31T23:59:59.999Z");
        assert_eq!(Timestamp::at(i64::MAX, 0), None);
    }
}
