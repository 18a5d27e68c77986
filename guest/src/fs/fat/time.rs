//! Dates and times as both formats pack them, in steps of two seconds since 1980.

use crate::fs::Time;

/// A date and a time of day; `None` where they are none. A zone is not known: it is taken as UTC.
/// `hundredths` of a second, 0 to 199, refine it.
pub(crate) fn time(date: u16, time: u16, hundredths: u8) -> Option<Time> {
    let (year, month, day) = (i64::from(date >> 9) + 1980, i64::from(date >> 5 & 15), date & 31);
    let (hour, minute, pair) = (time >> 11, time >> 5 & 63, time & 31);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let last = match month {
        2 => 28 + u16::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if !(1..=last).contains(&day) || hour > 23 || minute > 59 || pair > 29 {
        return None;
    }
    // Days since 1970-01-01, with years that begin in March, so that the leap day is their last one.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let before = year * 365 + year / 4 - year / 100 + year / 400 - 719_468;
    let days = before + (month * 153 + 2) / 5 + i64::from(day) - 1;
    let seconds = i64::from(hour) * 3600 + i64::from(minute) * 60 + i64::from(pair) * 2;
    let hundredths = if hundredths < 200 { hundredths } else { 0 };
    Some(Time {
        seconds: days * 86_400 + seconds + i64::from(hundredths / 100),
        nanoseconds: u32::from(hundredths % 100) * 10_000_000,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_as_the_calendar_has_them() {
        let at = |y: u16, m: u16, d: u16, h: u16, min: u16, s: u16, hundredths| {
            let found =
                time((y - 1980) << 9 | m << 5 | d, h << 11 | min << 5 | (s / 2), hundredths);
            found.map(|t| (t.seconds, t.nanoseconds))
        };
        assert_eq!(at(1980, 1, 1, 0, 0, 0, 0), Some((315_532_800, 0)));
        assert_eq!(at(2000, 2, 29, 23, 59, 58, 150), Some((951_868_799, 500_000_000)));
        assert_eq!(at(2026, 11, 25, 22, 40, 0, 1), Some((1_795_646_400, 10_000_000)));
        assert_eq!(at(2107, 12, 31, 23, 59, 58, 0), Some((4_354_819_198, 0)));
        for (month, day) in [(0, 1), (13, 1), (2, 30), (4, 31), (1, 0)] {
            assert_eq!(at(2000, month, day, 0, 0, 0, 0), None, "{month}-{day}");
        }
        assert_eq!(at(2001, 2, 29, 0, 0, 0, 0), None);
        assert_eq!(time(0, 0, 0), None);
    }
}
