//! The pieces of the signature schemes that servers verify and set-up code signs with: encodings, hashes, HMACs, dates.

use ring::{digest, hmac};
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// SHA-256 as lower-case hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// HMAC-SHA256.
pub fn hmac_sha256(key: &[u8], data: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), data).as_ref().to_vec()
}

/// HMAC-SHA1 (OSS V1).
pub fn hmac_sha1(key: &[u8], data: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, key), data).as_ref().to_vec()
}

/// Percent-encodes all but RFC 3986's unreserved characters, and `/` only when it does not separate (`keep_slash`).
pub fn encode(bytes: &[u8], keep_slash: bool) -> String {
    let mut out = String::with_capacity(bytes.len());
    for &b in bytes {
        if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) || (keep_slash && b == b'/') {
            out.push(b as char);
        } else {
            let _ = write!(out, "%{b:02X}");
        }
    }
    out
}

/// `20260102T030405Z`.
pub fn amz_date(t: SystemTime) -> String {
    let c = Civil::of(t);
    format!("{:04}{:02}{:02}T{:02}{:02}{:02}Z", c.year, c.month, c.day, c.hour, c.minute, c.second)
}

/// `2026-01-02T03:04:05.000Z`, as listings write it.
pub fn iso_date(t: SystemTime) -> String {
    let c = Civil::of(t);
    format!("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.000Z", c.year, c.month, c.day, c.hour, c.minute, c.second)
}

/// `Fri, 02 Jan 2026 03:04:05 GMT`, as HTTP headers write it.
pub fn http_date(t: SystemTime) -> String {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    let c = Civil::of(t);
    let (day, month) = (DAYS[c.weekday], MONTHS[c.month as usize - 1]);
    format!("{day}, {:02} {month} {:04} {:02}:{:02}:{:02} GMT", c.day, c.year, c.hour, c.minute, c.second)
}

/// Seconds since the epoch of a date written by [`amz_date`], or of an HTTP date.
pub fn parse_date(text: &str) -> Option<i64> {
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let number = |s: Option<&str>| s.and_then(|s| s.parse::<i64>().ok());
    if text.len() == 16 && text.ends_with('Z') {
        let part = |a, b| number(text.get(a..b));
        let days = days_from_civil(part(0, 4)?, part(4, 6)?, part(6, 8)?);
        return Some(days * 86_400 + part(9, 11)? * 3600 + part(11, 13)? * 60 + part(13, 15)?);
    }
    let mut words = text.split([' ', ':']).skip(1);
    let day = number(words.next())?;
    let name = words.next().filter(|m| m.len() == 3)?;
    let month = MONTHS.find(name)? as i64 / 3 + 1;
    let year = number(words.next())?;
    let (h, m, s) = (number(words.next())?, number(words.next())?, number(words.next())?);
    Some(days_from_civil(year, month, day) * 86_400 + h * 3600 + m * 60 + s)
}

struct Civil {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
    weekday: usize,
}

impl Civil {
    /// UTC calendar date; the day arithmetic counts in eras of 400 years that start on 1 March.
    fn of(t: SystemTime) -> Civil {
        let seconds = t.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * day_of_year + 2) / 153;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        Civil {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * from_march + 2) / 5 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
            weekday: days.rem_euclid(7) as usize,
        }
    }
}

fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (y.div_euclid(400), y.rem_euclid(400));
    let day_of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// AWS Signature Version 4: HMAC of the string to sign under the key of `scope` (`date/region/service/aws4_request`).
pub fn sigv4_signature(secret: &str, scope: &str, date: &str, canonical_request: &str) -> Vec<u8> {
    chained_signature("AWS4", "AWS4-HMAC-SHA256", secret, scope, date, canonical_request)
}

/// OSS V4: the same chain with other names.
pub fn oss_v4_signature(secret: &str, scope: &str, date: &str, canonical_request: &str) -> Vec<u8> {
    chained_signature("aliyun_v4", "OSS4-HMAC-SHA256", secret, scope, date, canonical_request)
}

fn chained_signature(prefix: &str, name: &str, secret: &str, scope: &str, date: &str, canonical: &str) -> Vec<u8> {
    let key =
        scope.split('/').fold(format!("{prefix}{secret}").into_bytes(), |key, part| hmac_sha256(&key, part.as_bytes()));
    let to_sign = format!("{name}\n{date}\n{scope}\n{}", sha256_hex(canonical.as_bytes()));
    hmac_sha256(&key, to_sign.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates() {
        let t = UNIX_EPOCH + Duration::from_secs(1_709_210_096); // 29 February 2024, a Thursday
        assert_eq!(http_date(t), "Thu, 29 Feb 2024 12:34:56 GMT");
        assert_eq!(amz_date(t), "20240229T123456Z");
        assert_eq!(iso_date(t), "2024-02-29T12:34:56.000Z");
        assert_eq!(parse_date(&amz_date(t)), Some(1_709_210_096));
        assert_eq!(parse_date(&http_date(t)), Some(1_709_210_096));
        assert_eq!(parse_date("yesterday"), None);
        assert_eq!(parse_date("Thu, 29 xx 2024 12:34:56 GMT"), None);
    }

    #[test]
    fn sigv4_known_answer() {
        // AWS documentation, "Signature calculations for the Authorization header", example GET Object.
        let canonical = "GET\n/test.txt\n\nhost:examplebucket.s3.amazonaws.com\nrange:bytes=0-9\n\
            x-amz-content-sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n\
            x-amz-date:20130524T000000Z\n\nhost;range;x-amz-content-sha256;x-amz-date\n\
            e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let signature = sigv4_signature(
            "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            "20130524/us-east-1/s3/aws4_request",
            "20130524T000000Z",
            canonical,
        );
        assert_eq!(hex(&signature), "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41");
    }

    #[test]
    fn encoding() {
        assert_eq!(encode("a b/ü~".as_bytes(), true), "a%20b/%C3%BC~");
        assert_eq!(encode(b"a/b", false), "a%2Fb");
    }
}
