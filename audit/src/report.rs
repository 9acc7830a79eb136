//! The table that an auditor asks for: where, in one month, the requests of one tenant were worked
//! on, by which machines, and what was refused.
//!
//! Pure: records in, a table out, which is written as JSON, CSV or a page. Whether the records are
//! what was signed is for [`crate::verify`], which whoever reports runs first.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::str::FromStr;

use entente_proto::ids::{Region, TenantName};
use serde::{Serialize, Serializer};

use crate::record::{Digest, Record, Request};

/// A month of the calendar, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Month {
    year: i64,
    /// 1 to 12.
    month: u64,
}

impl Month {
    /// The month of a moment, in milliseconds since 1970.
    pub fn of(at_ms: u64) -> Self {
        let (year, month, _) = date(at_ms);
        Self { year, month }
    }
}

impl FromStr for Month {
    type Err = String;

    /// Reads `2026-11`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a month such as 2026-11");
        let (year, month) = text.split_once('-').ok_or_else(wrong)?;
        let (year, month): (i64, u64) =
            (year.parse().map_err(|_| wrong())?, month.parse().map_err(|_| wrong())?);
        let parsed = Self { year, month };
        let valid = (1970..=9999).contains(&year) && (1..=12).contains(&month);
        if valid && parsed.to_string() == text { Ok(parsed) } else { Err(wrong()) }
    }
}

impl std::fmt::Display for Month {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04}-{:02}", self.year, self.month)
    }
}

impl Serialize for Month {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Year, month and day of a moment: the civil calendar counted from the first of March of year 0,
/// so that the leap day is the last of a year (H. Hinnant, "chrono-compatible low-level date
/// algorithms").
fn date(at_ms: u64) -> (i64, u64, u64) {
    let days = at_ms / 86_400_000 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = (year_of_era + era * 400) as i64 + i64::from(month <= 2);
    (year, month, day)
}

/// A moment as ISO 8601 has it, to the second.
pub fn iso(at_ms: u64) -> String {
    let ((year, month, day), s) = (date(at_ms), at_ms / 1_000 % 86_400);
    let (hour, minute, second) = (s / 3_600, s / 60 % 60, s % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// What a machine did for the tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Where it stands, by its certificate.
    pub region: Region,
    /// Its name.
    pub node: String,
    /// `coordinator` (text, attention) or `expert-node` (rows of hidden states).
    pub role: &'static str,
    /// SHA-256 of the certificates that it showed.
    pub certificates: BTreeSet<Digest>,
    /// Requests that it had a part in.
    pub requests: u64,
    /// Assignments of a row to an expert that it was sent.
    pub rows: u64,
    /// When the first of these requests began.
    pub first: String,
    /// When the last of them ended.
    pub last: String,
}

/// The report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whose.
    pub tenant: TenantName,
    /// When, in UTC; a request belongs to the month in which it ended.
    pub month: Month,
    /// The logs that it is from: origin, and how many records of it were looked at.
    pub logs: BTreeMap<String, u64>,
    /// Requests that were worked on.
    pub requests: u64,
    /// Tokens of prompts and tokens generated.
    pub tokens: [u64; 2],
    /// How requests ended.
    pub decisions: BTreeMap<String, u64>,
    /// The policies that they were admitted under.
    pub policies: BTreeSet<String>,
    /// The models that answered.
    pub models: BTreeSet<Digest>,
    /// Every region in which anything of any request was worked on.
    pub regions: BTreeSet<Region>,
    /// The machines.
    pub places: Vec<Place>,
    /// Requests that were refused, by code.
    pub refused: BTreeMap<String, u64>,
}

/// Gathers a report, record by record.
pub struct Gatherer {
    report: Report,
    places: BTreeMap<(Region, &'static str, String), (Place, u64, u64)>,
}

impl Gatherer {
    /// Begins one.
    pub fn new(tenant: TenantName, month: Month) -> Self {
        let report = Report {
            tenant,
            month,
            logs: BTreeMap::new(),
            requests: 0,
            tokens: [0; 2],
            decisions: BTreeMap::new(),
            policies: BTreeSet::new(),
            models: BTreeSet::new(),
            regions: BTreeSet::new(),
            places: Vec::new(),
            refused: BTreeMap::new(),
        };
        Self { report, places: BTreeMap::new() }
    }

    /// Looks at a record of the log `origin`.
    pub fn add(&mut self, origin: &str, record: &Record) {
        *self.report.logs.entry(origin.to_owned()).or_default() += 1;
        if record.tenant() != Some(&self.report.tenant) {
            return;
        }
        match record {
            Record::Request(request) if Month::of(request.ended_ms) == self.report.month => {
                self.request(request);
            }
            Record::Refused(refused) if Month::of(refused.at_ms) == self.report.month => {
                *self.report.refused.entry(refused.code.clone()).or_default() += 1;
            }
            _ => {}
        }
    }

    fn request(&mut self, request: &Request) {
        self.report.requests += 1;
        self.report.tokens[0] += request.prompt_tokens;
        self.report.tokens[1] += request.completion_tokens;
        *self.report.decisions.entry(request.decision.clone()).or_default() += 1;
        self.report.policies.extend(request.policy.as_ref().map(|policy| policy.id.clone()));
        self.report.models.insert(request.model);
        let own = &request.coordinator;
        self.place(request, (own.region, "coordinator", own.node.as_str()), own.certificate, 0);
        let mut seen = BTreeSet::new();
        for node in &request.nodes {
            // Two starts of a node are one machine.
            let counts = seen.insert(&node.node);
            let key = (node.region, "expert-node", node.node.as_str());
            self.place(request, key, node.certificate, node.rows);
            if !counts && let Some((place, _, _)) = self.places.get_mut(&owned(key)) {
                place.requests -= 1;
            }
        }
    }

    fn place(
        &mut self,
        request: &Request,
        key: (Region, &'static str, &str),
        certificate: Option<Digest>,
        rows: u64,
    ) {
        let (region, role, node) = key;
        self.report.regions.insert(region);
        let new = || {
            let (first, last) = (String::new(), String::new());
            let (node, certificates) = (node.to_owned(), BTreeSet::new());
            let place =
                Place { region, node, role, certificates, requests: 0, rows: 0, first, last };
            (place, u64::MAX, 0)
        };
        let (place, first, last) = self.places.entry(owned(key)).or_insert_with(new);
        place.certificates.extend(certificate);
        place.requests += 1;
        place.rows += rows;
        *first = (*first).min(request.begun_ms);
        *last = (*last).max(request.ended_ms);
    }

    /// The report.
    pub fn end(mut self) -> Report {
        let dated = |(place, first, last): (Place, u64, u64)| Place {
            first: iso(first),
            last: iso(last),
            ..place
        };
        self.report.places = self.places.into_values().map(dated).collect();
        self.report
    }
}

fn owned((region, role, node): (Region, &'static str, &str)) -> (Region, &'static str, String) {
    (region, role, node.to_owned())
}

const COLUMNS: [&str; 10] = [
    "tenant",
    "month",
    "region",
    "role",
    "node",
    "certificates_sha256",
    "requests",
    "rows",
    "first_request_at",
    "last_request_at",
];

impl Report {
    /// The locations table as CSV (RFC 4180): one line a machine.
    pub fn csv(&self) -> String {
        let mut text = COLUMNS.join(",") + "\r\n";
        for place in &self.places {
            let cells = self.cells(place);
            // Names, codes, numbers and dates: nothing of it needs quotes.
            text += &(cells.join(",") + "\r\n");
        }
        text
    }

    fn cells(&self, place: &Place) -> [String; 10] {
        let certificates: Vec<String> = place.certificates.iter().map(Digest::to_string).collect();
        [
            self.tenant.to_string(),
            self.month.to_string(),
            place.region.to_string(),
            place.role.to_owned(),
            place.node.clone(),
            certificates.join(" "),
            place.requests.to_string(),
            place.rows.to_string(),
            place.first.clone(),
            place.last.clone(),
        ]
    }

    /// The same as a page that needs nothing else.
    pub fn html(&self) -> String {
        let regions: Vec<&str> = self.regions.iter().map(Region::as_str).collect();
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\n\
             <title>Processing locations of {tenant}, {month}</title>\n\
             <style>body{{font:15px/1.5 sans-serif;margin:2em;max-width:75em}}\
             table{{border-collapse:collapse}}th,td{{border:1px solid #bbb;padding:.3em .6em;\
             text-align:left;vertical-align:top}}code{{font-size:85%;word-break:break-all}}</style>\n\
             <h1>Processing locations of {tenant}, {month}</h1>\n\
             <p>{requests} requests were worked on, in: <strong>{regions}</strong>. \
             Prompts had {prompt} tokens, answers {answer}.</p>\n",
            tenant = self.tenant,
            month = self.month,
            requests = self.requests,
            regions = if regions.is_empty() { "nowhere".to_owned() } else { regions.join(", ") },
            prompt = self.tokens[0],
            answer = self.tokens[1],
        );
        page += "<h2>Machines</h2>\n<table><tr>";
        COLUMNS[2..]
            .iter()
            .for_each(|column| page += &format!("<th>{}</th>", column.replace('_', " ")));
        page += "</tr>\n";
        for place in &self.places {
            let cells = self.cells(place);
            let cell = |(at, text): (usize, &String)| match at {
                3 => format!("<td><code>{}</code></td>", escape(text)),
                _ => format!("<td>{}</td>", escape(text)),
            };
            page += &format!(
                "<tr>{}</tr>\n",
                cells[2..].iter().enumerate().map(cell).collect::<String>()
            );
        }
        page += "</table>\n";
        counts(&mut page, "How requests ended", &self.decisions);
        counts(&mut page, "Refused, by code", &self.refused);
        counts(&mut page, "Logs, and records looked at", &self.logs);
        let policies: Vec<String> = self.policies.iter().map(|id| escape(id)).collect();
        let _ = writeln!(page, "<p>Policies: {}</p>\n</html>", policies.join(", "));
        page
    }
}

fn counts(page: &mut String, title: &str, counts: &BTreeMap<String, u64>) {
    let _ = writeln!(page, "<h2>{title}</h2>\n<table>");
    for (name, count) in counts {
        let _ = writeln!(page, "<tr><td>{}</td><td>{count}</td></tr>", escape(name));
    }
    *page += "</table>\n";
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::request;

    #[test]
    fn months_are_those_of_the_calendar() {
        for (at_ms, wanted) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (1_709_251_199_000, "2024-02-29T23:59:59Z"),
            (1_795_321_880_000, "2026-11-22T04:31:20Z"),
            (4_102_444_799_999, "2099-12-31T23:59:59Z"),
        ] {
            assert_eq!(iso(at_ms), wanted);
            assert_eq!(Month::of(at_ms).to_string(), wanted[..7]);
        }
        for bad in ["2026", "2026-13", "2026-1", "26-01", "2026-00", "2026-011"] {
            assert!(bad.parse::<Month>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_report_counts_the_tenants_month_and_nothing_else() {
        let mut gatherer = Gatherer::new("tax-office".parse().unwrap(), "2026-11".parse().unwrap());
        let mut add = |request: Request| gatherer.add("log", &Record::Request(Box::new(request)));
        add(request(1, "fr"));
        let mut twice = request(2, "se");
        twice.nodes = vec![twice.nodes[0].clone(), twice.nodes[0].clone()];
        add(twice);
        add(Request { tenant: "another".parse().unwrap(), ..request(3, "de") });
        add(Request { ended_ms: 1_700_000_000_000, ..request(4, "de") });
        let report = gatherer.end();
        assert_eq!((report.requests, report.tokens), (2, [24, 8]));
        let regions: Vec<&str> = report.regions.iter().map(Region::as_str).collect();
        assert_eq!(regions, ["fr", "se"]);
        let csv = report.csv();
        let rows: Vec<&str> = csv.split("\r\n").collect();
        assert_eq!(rows.len(), 5, "{csv}");
        assert!(rows[1].starts_with("tax-office,2026-11,fr,coordinator,fr-coordinator,,2,0,"));
        assert!(rows[2].starts_with("tax-office,2026-11,fr,expert-node,fr-expert-1,,1,64,"));
        assert!(rows[3].starts_with("tax-office,2026-11,se,expert-node,fr-expert-1,,1,128,"));
        let page = report.html();
        assert!(page.contains("<strong>fr, se</strong>") && page.contains("<td>fr-expert-1</td>"));
        assert_eq!(report.logs["log"], 4);
    }
}
