//! `efc dataset`: named sources with their policies. The same JSON goes in (`create --from-file`) and comes out (`show`).

use crate::context::Context;
use crate::output::{ago, fields, span};
use crate::table::Table;
use clap::{Args, Subcommand};
use efc_common::error::Context as _;
use efc_common::source::{SecretRef, SourceSpec};
use efc_common::units::parse_duration;
use efc_common::{Error, Kind, Result};
use efc_proto::control;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

/// Consistency of a dataset that names none.
const CONSISTENCY: &str = "ttl=60";

#[derive(Debug, Subcommand)]
pub(crate) enum DatasetCommand {
    /// Name a source, or several under one tree.
    #[command(
        after_help = "Examples:\n  efc dataset create images s3://bucket/images -O endpoint=https://s3.example.com --secret \
dir:/etc/efc/s3 --consistency immutable\n  efc dataset create home nfs://nas/export/home --consistency ttl=5\n  efc dataset create \
--from-file dataset.json\n\ndataset.json: {\"name\": \"all\", \"mounts\": [{\"path\": \"/\", \"source\": \"s3://bucket\", \"options\": \
{\"endpoint\": \"https://s3.example.com\"}, \"secret\": \"env\"}, {\"path\": \"/nas\", \"source\": \"nfs://nas/export\"}], \"consistency\": \
\"ttl=60\", \"cache\": {\"ttl_seconds\": 0, \"pin\": false}}"
    )]
    Create(CreateArgs),
    /// All datasets.
    #[command(after_help = "Example: efc dataset list -o json")]
    List,
    /// One dataset; the JSON can be given to `create --from-file`.
    #[command(after_help = "Example: efc dataset show images -o json > dataset.json")]
    Show(ShowArgs),
    /// Forget a dataset; its data at the origin stays.
    #[command(after_help = "Example: efc dataset delete images --yes")]
    Delete(DeleteArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Its name: a-z, 0-9 and -.
    #[arg(required_unless_present = "from_file")]
    name: Option<String>,
    /// oss://bucket/prefix, s3://bucket/prefix, nfs://host[:port]/export/path or file:///dir.
    #[arg(required_unless_present = "from_file", conflicts_with = "from_file")]
    source: Option<String>,
    /// Where in the dataset the source appears.
    #[arg(long, default_value = "/", conflicts_with = "from_file")]
    path: String,
    /// Option of the source (`efc-fuse mount --help` lists them); may be repeated.
    #[arg(short = 'O', value_name = "KEY=VALUE", value_parser = key_value, conflicts_with = "from_file")]
    options: Vec<(String, String)>,
    /// Where the credentials are: env, dir:/path, process:/command, role[:NAME], oidc or anonymous.
    #[arg(long, value_name = "REF", default_value = "env", conflicts_with = "from_file")]
    secret: String,
    /// How long names and attributes may be believed: ttl=SECONDS or immutable.
    #[arg(long, default_value = CONSISTENCY, conflicts_with = "from_file")]
    consistency: String,
    /// Cached data is dropped after this, for example 7d (default: never).
    #[arg(long, value_name = "TIME", conflicts_with = "from_file")]
    ttl: Option<String>,
    /// What `efc warmup` brings into the cache of it is pinned there.
    #[arg(long, conflicts_with = "from_file")]
    pin: bool,
    /// Read the whole dataset from a JSON file (`-`: stdin); a NAME given beside it wins.
    #[arg(long, value_name = "FILE")]
    from_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// Its name.
    name: String,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// Its name.
    name: String,
    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
}

/// JSON of a dataset: `efc dataset create|show|delete`, elements of `list`, and `--from-file`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Dataset {
    /// Its name.
    #[serde(default)]
    name: String,
    /// Number given by the master; ignored on the way in.
    #[serde(default)]
    id: u64,
    /// When it was made, Unix milliseconds; ignored on the way in.
    #[serde(default)]
    created_ms: u64,
    /// `ttl=SECONDS` or `immutable`.
    #[serde(default = "default_consistency")]
    consistency: String,
    /// Cache policy.
    #[serde(default)]
    cache: Cache,
    /// Its sources.
    mounts: Vec<Mount>,
}

/// Cache policy in the JSON of a dataset.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cache {
    /// Cached data is dropped after so many seconds; 0: never.
    #[serde(default)]
    ttl_seconds: u64,
    /// Cached data is pinned.
    #[serde(default)]
    pin: bool,
}

/// One source in the JSON of a dataset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mount {
    /// Where it appears.
    #[serde(default = "default_path")]
    path: String,
    /// Its URL.
    source: String,
    /// Options of the source.
    #[serde(default)]
    options: BTreeMap<String, String>,
    /// Where the credentials are.
    #[serde(default)]
    secret: SecretRef,
    /// Nothing is written to it.
    #[serde(default = "default_read_only")]
    read_only: bool,
}

/// JSON of `efc dataset list`.
#[derive(Debug, Serialize)]
struct Listing {
    /// By name.
    datasets: Vec<Dataset>,
}

fn default_consistency() -> String {
    CONSISTENCY.into()
}

fn default_path() -> String {
    "/".into()
}

fn default_read_only() -> bool {
    true
}

fn key_value(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((k, v)) if !k.is_empty() => Ok((k.into(), v.into())),
        _ => Err(format!("`{text}` is not KEY=VALUE, for example endpoint=https://s3.example.com")),
    }
}

pub(crate) async fn run(context: &Context, command: DatasetCommand) -> Result<()> {
    match command {
        DatasetCommand::Create(a) => {
            let wanted = from_args(a)?.to_wire()?;
            let made = context.master()?.create_dataset(wanted).await?;
            context.output.print(&Dataset::from_wire(made)?, |d| format!("dataset {} is there", d.name))
        }
        DatasetCommand::List => {
            let all = context.master()?.list_datasets().await?;
            let mut datasets = all.into_iter().map(Dataset::from_wire).collect::<Result<Vec<_>>>()?;
            datasets.sort_by(|a, b| a.name.cmp(&b.name));
            context.output.print(&Listing { datasets }, |l| list_table(&l.datasets))
        }
        DatasetCommand::Show(a) => context.output.print(&get(context, &a.name).await?, show_table),
        DatasetCommand::Delete(a) => delete(context, &a).await,
    }
}

async fn get(context: &Context, name: &str) -> Result<Dataset> {
    Dataset::from_wire(crate::dataset::get(&context.master()?, name).await?)
}

async fn delete(context: &Context, args: &DeleteArgs) -> Result<()> {
    let found = get(context, &args.name).await?;
    if !args.yes && !confirmed(&found)? {
        return Err(Error::new(Kind::Cancelled, format!("dataset `{}` was not deleted", args.name)));
    }
    match context.master()?.delete_dataset(&args.name).await {
        Ok(gone) => context.output.print(&Dataset::from_wire(gone)?, |d| format!("dataset {} is deleted", d.name)),
        Err(e) if e.is(Kind::Busy) => {
            Err(e).context(format!("dataset `{}` is mounted; `efc sessions` shows where", args.name))
        }
        Err(e) => Err(e),
    }
}

fn confirmed(d: &Dataset) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        let what = format!("nobody can be asked whether to delete dataset `{}`; give --yes", d.name);
        return Err(Error::new(Kind::Invalid, what));
    }
    let sources: Vec<&str> = d.mounts.iter().map(|m| m.source.as_str()).collect();
    let mut err = std::io::stderr();
    write!(err, "Delete dataset {} ({})? Its data at the origin stays. [y/N] ", d.name, sources.join(", "))?;
    err.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}

fn from_args(args: CreateArgs) -> Result<Dataset> {
    if let Some(file) = &args.from_file {
        let mut d = from_file(file)?;
        d.name = args.name.unwrap_or(d.name);
        if d.name.is_empty() {
            return Err(Error::new(Kind::Invalid, "the dataset has no name; give it in the file or as NAME"));
        }
        return Ok(d);
    }
    let ttl_seconds = match &args.ttl {
        Some(text) => parse_duration(text).context("--ttl")?.as_secs(),
        None => 0,
    };
    let mount = Mount {
        path: args.path,
        source: args.source.unwrap_or_default(),
        options: args.options.into_iter().collect(),
        secret: args.secret.parse()?,
        read_only: true,
    };
    Ok(Dataset {
        name: args.name.unwrap_or_default(),
        id: 0,
        created_ms: 0,
        consistency: args.consistency,
        cache: Cache { ttl_seconds, pin: args.pin },
        mounts: vec![mount],
    })
}

fn from_file(path: &Path) -> Result<Dataset> {
    let mut text = String::new();
    if path.as_os_str() == "-" {
        std::io::stdin().read_to_string(&mut text).map_err(Error::from).context("stdin cannot be read")?;
    } else {
        text = std::fs::read_to_string(path)
            .map_err(Error::from)
            .context(format!("dataset file {} cannot be read", path.display()))?;
    }
    serde_json::from_str(&text).map_err(|e| {
        let what = format!("{} does not describe a dataset; `efc dataset create --help` shows one", path.display());
        Error::new(Kind::Invalid, what).caused_by(e)
    })
}

impl Dataset {
    fn to_wire(&self) -> Result<control::Dataset> {
        let mounts = self.mounts.iter().map(Mount::to_wire).collect::<Result<_>>()?;
        Ok(control::Dataset {
            name: self.name.clone(),
            mounts,
            consistency: self.consistency.clone(),
            cache: Some(control::CachePolicy { ttl_seconds: self.cache.ttl_seconds, pin: self.cache.pin }),
            created_ms: 0,
            id: 0,
        })
    }

    fn from_wire(d: control::Dataset) -> Result<Dataset> {
        let mount = |m: control::Mount| {
            let spec = crate::dataset::source_of(&d.name, &m)?;
            let source = spec.url();
            Ok(Mount { path: m.path, source, options: spec.options, secret: spec.secret, read_only: m.read_only })
        };
        let mounts = d.mounts.into_iter().map(mount).collect::<Result<_>>()?;
        let cache = d.cache.unwrap_or_default();
        Ok(Dataset {
            name: d.name,
            id: d.id,
            created_ms: d.created_ms,
            consistency: d.consistency,
            cache: Cache { ttl_seconds: cache.ttl_seconds, pin: cache.pin },
            mounts,
        })
    }
}

impl Mount {
    fn to_wire(&self) -> Result<control::Mount> {
        let spec = SourceSpec::parse(&self.source, self.options.clone(), self.secret.clone())?;
        let source_json = serde_json::to_string(&spec)
            .map_err(|e| Error::new(Kind::Invalid, format!("source {}", self.source)).caused_by(e))?;
        Ok(control::Mount { path: self.path.clone(), source_json, read_only: self.read_only })
    }
}

fn policy(c: &Cache) -> String {
    let ttl = if c.ttl_seconds == 0 { "keep".into() } else { format!("ttl {}", span(c.ttl_seconds * 1000)) };
    if c.pin { format!("{ttl}, pinned") } else { ttl }
}

fn list_table(datasets: &[Dataset]) -> String {
    let mut t = Table::new(&["NAME", "SOURCE", "CONSISTENCY", "CACHE", "CREATED"]);
    for d in datasets {
        let first = d.mounts.first().map(|m| m.source.clone()).unwrap_or_default();
        let more = d.mounts.len().saturating_sub(1);
        let source = if more == 0 { first } else { format!("{first} and {more} more") };
        t.row([d.name.clone(), source, d.consistency.clone(), policy(&d.cache), ago(d.created_ms)]);
    }
    t.to_string()
}

fn show_table(d: &Dataset) -> String {
    let mut t = Table::new(&["PATH", "SOURCE", "SECRET", "OPTIONS"]);
    for m in &d.mounts {
        let options: Vec<String> = m.options.iter().map(|(k, v)| format!("{k}={v}")).collect();
        t.row([m.path.clone(), m.source.clone(), m.secret.to_string(), options.join(" ")]);
    }
    let head = fields(&[
        ("name", d.name.clone()),
        ("consistency", d.consistency.clone()),
        ("cache", policy(&d.cache)),
        ("created", ago(d.created_ms)),
    ]);
    format!("{head}\n{t}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> std::result::Result<Dataset, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn what_comes_out_goes_in() {
        let d = parse(
            r#"{"name":"all","mounts":[
                {"source":"s3://b/p","options":{"endpoint":"http://h:1","region":"x"},"secret":"dir:/k"},
                {"path":"/nas","source":"nfs://nas:2049/export"}],
               "consistency":"immutable","cache":{"ttl_seconds":60,"pin":true}}"#,
        )
        .expect("parse");
        assert_eq!((d.mounts[0].path.as_str(), d.mounts[1].secret.clone()), ("/", SecretRef::Env));
        let back = Dataset::from_wire(d.to_wire().expect("to wire")).expect("from wire");
        let again = Dataset::from_wire(back.to_wire().expect("to wire")).expect("from wire");
        assert_eq!(back, again);
        assert_eq!(back.mounts[0].options["endpoint"], "http://h:1");
        let text = serde_json::to_string(&back).expect("json");
        assert_eq!(parse(&text).expect("parse"), back);
    }

    #[test]
    fn wrong_descriptions_are_refused() {
        assert!(parse(r#"{"name":"x"}"#).is_err());
        assert!(parse(r#"{"mounts":[{"source":"s3://b","optoins":{}}]}"#).is_err());
        let d = parse(r#"{"name":"x","mounts":[{"source":"ftp://b"}]}"#).expect("parse");
        assert!(d.to_wire().is_err_and(|e| e.is(Kind::Invalid) && e.to_string().contains("ftp")));
    }
}
