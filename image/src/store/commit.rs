//! Images made of another image and one more layer.

use std::io::Read;

use rustix::fs::FlockOperation;
use serde_json::{Map, Value};

use super::files::StoredLayer;
use super::options::PullOptions;
use super::record::DiskRecord;
use super::work::Work;
use super::{Store, StoredImage};
use crate::Error;
use crate::config::{Config, History, ImageConfig};
use crate::digest::Digest;
use crate::docker_reference::DockerReference;
use crate::documents::{diff_ids, parse};
use crate::layer::Expected;
use crate::progress::{LayerStep, Progress};
use crate::source::{Origin, SourceImage, SourceLayer};

/// The description of an image that [`Store::commit`] creates.
pub struct Commit<'a> {
    /// Name of the image; it is identified by its ID if there is none.
    pub name: Option<&'a DockerReference>,
    /// Time of creation (RFC 3339).
    pub created: String,
    /// Author of the image.
    pub author: Option<String>,
    /// The command that has made the changes, for the history.
    pub created_by: String,
    /// Comment in the history.
    pub comment: Option<String>,
    /// Changes the defaults of containers, which are those of the base.
    pub change: &'a mut dyn FnMut(&mut Config),
}

impl Store {
    /// Creates an image of the layers of the image `base`, which is in the store, and those
    /// changes that the tar stream of a layer has. Without changes, the image has the layers
    /// of the base. Members of the base's configuration that this crate does not use stay.
    ///
    /// # Errors
    /// The base is not in the store, the stream is not a layer, or the store cannot be
    /// written.
    pub fn commit(
        &self,
        base: Digest,
        stream: impl Read + Send,
        commit: Commit<'_>,
        options: &PullOptions<'_>,
    ) -> Result<StoredImage, Error> {
        let work = self.begin()?;
        let base_record = work.needed_base(base)?;
        let base_config = work.configuration_of(base_record.config_digest)?;
        let converted = work.convert_changes(stream, options)?;
        // A push needs not compress layers that registries have in another form already.
        let shared = base_record.layers.iter().map(|layer| {
            let media_type = layer.media_type.clone();
            SourceLayer::shared(layer.diff_id, layer.digest, layer.size, media_type)
        });
        let layers: Vec<_> = shared.chain(converted.map(SourceLayer::plain)).collect();
        let origin = base_record.origin.map(|origin| Origin {
            base: origin.base.or(Some(base)),
            ..origin
        });
        let name = commit.name;
        let config_bytes = configuration(&base_config, converted, commit)?;
        let config: ImageConfig = parse(&config_bytes, "configuration")?;
        // The number of layers is limited.
        diff_ids(&config, layers.len())?;
        let digest = Digest::of(&config_bytes);
        let image = SourceImage {
            digest,
            named: digest,
            manifest: None,
            config_bytes,
            config,
            layers,
            origin,
        };
        let name = name.map_or_else(|| digest.to_string(), ToString::to_string);
        work.store_committed(&image, &name, options)
    }
}

impl Work {
    /// Records that an image is needed, and returns its record.
    fn needed_base(&self, base: Digest) -> Result<DiskRecord, Error> {
        let store = &self.store;
        // The lock prevents removals between lookup and recording.
        let record = {
            let _in_use = store.lock(FlockOperation::LockShared)?;
            store.record_of(&base.to_string(), base)?
        };
        let disk = store.disk_path(base);
        self.need(store.parts(base, &record).into_iter().chain([disk]))?;
        Ok(record)
    }

    fn configuration_of(&self, digest: Digest) -> Result<Vec<u8>, Error> {
        self.store.document(digest)?.ok_or_else(|| Error::Blob {
            digest: digest.to_string(),
            reason: "the configuration is missing from the store".to_owned(),
        })
    }

    /// Converts a layer; `None` if it has no entries.
    fn convert_changes(
        &self,
        stream: impl Read + Send,
        options: &PullOptions<'_>,
    ) -> Result<Option<Digest>, Error> {
        // Placeholder in progress reports and errors until the digest is known.
        let unknown = Digest::of(b"");
        let expected = Expected {
            digest: unknown,
            size: None,
            diff_id: None,
        };
        let mut progress = |done| {
            (options.report)(Progress::Layer {
                number: 1,
                of: 1,
                digest: unknown,
                step: LayerStep::Moving { done, total: None },
            });
        };
        let converted = self.convert_unknown(stream, &expected, &mut progress, options)?;
        Ok((converted.totals.entries > 0).then_some(converted.diff_id))
    }

    fn store_committed(
        &self,
        image: &SourceImage,
        name: &str,
        options: &PullOptions<'_>,
    ) -> Result<StoredImage, Error> {
        let (store, digest) = (&self.store, image.digest);
        let layers = image.layers.iter();
        let layers = layers.map(|layer| (layer.diff_id, layer.digest));
        let parts = store.parts_of(digest, digest, layers);
        self.need(parts.into_iter().chain([store.disk_path(digest)]))?;
        let _creating = store.lock_creation("disk", digest, &options.message())?;
        let layers = image.layers.iter();
        let layers =
            layers.map(|layer| StoredLayer::open_published(store.layer_path(layer.diff_id)));
        let layers = layers.collect::<Result<_, _>>()?;
        let stored = match store.stored(digest)? {
            Some(stored) => stored,
            None => store.finish(image, name, layers)?,
        };
        store.name(name, digest, &stored)?;
        Ok(stored)
    }
}

/// Returns the configuration of the base with changes and, if there is one, a layer.
fn configuration(base: &[u8], layer: Option<Digest>, commit: Commit<'_>) -> Result<Vec<u8>, Error> {
    let malformed = |text: &str| Error::document("configuration", text.to_owned());
    let mut document: Map<String, Value> = parse(base, "configuration")?;
    let known: ImageConfig = parse(base, "configuration")?;
    let mut config = known.config.unwrap_or_default();
    let before = members(&config)?;
    (commit.change)(&mut config);
    let mut after = members(&config)?;
    let defaults = document
        .entry("config")
        .or_insert_with(|| Value::Object(Map::new()));
    if defaults.is_null() {
        *defaults = Value::Object(Map::new());
    }
    let Value::Object(defaults) = defaults else {
        return Err(malformed("its defaults are no object"));
    };
    // A member that is not changed stays as it was written.
    for (name, value) in before {
        match after.remove(&name) {
            Some(changed) if changed == value => {}
            Some(changed) => drop(defaults.insert(name, changed)),
            None => drop(defaults.remove(&name)),
        }
    }
    defaults.extend(after);
    let mut history = known.history.unwrap_or_default();
    history.push(History {
        created: Some(commit.created.clone()),
        author: commit.author.clone(),
        created_by: Some(commit.created_by),
        comment: commit.comment,
        empty_layer: layer.is_none().then_some(true),
    });
    let history = serde_json::to_value(history);
    let history = history.map_err(|error| Error::document("configuration", error))?;
    document.insert("history".to_owned(), history);
    document.insert("created".to_owned(), commit.created.into());
    if let Some(author) = commit.author {
        document.insert("author".to_owned(), author.into());
    }
    if let Some(layer) = layer {
        let rootfs = document.get_mut("rootfs");
        let diff_ids = rootfs.and_then(|rootfs| rootfs.get_mut("diff_ids"));
        let diff_ids = diff_ids.and_then(Value::as_array_mut);
        let diff_ids = diff_ids.ok_or_else(|| malformed("it has no list of layers"))?;
        diff_ids.push(layer.to_string().into());
    }
    serde_json::to_vec(&document).map_err(|error| Error::document("configuration", error))
}

/// Returns the members that are set, as they are serialized.
fn members(config: &Config) -> Result<Map<String, Value>, Error> {
    match serde_json::to_value(config) {
        Ok(Value::Object(members)) => Ok(members),
        Ok(_) => Ok(Map::new()),
        Err(error) => Err(Error::document("configuration", error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#"{
        "architecture": "amd64", "os": "linux", "author": "first", "extra": [1],
        "config": {"Env": ["A=1"], "Cmd": ["x"], "Other": 1,
            "Healthcheck": {"Test": ["NONE"], "StartInterval": 5}},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:00"]},
        "history": [{"created_by": "RUN x"}]
    }"#;

    fn committed(base: &str, layer: Option<Digest>, change: &mut dyn FnMut(&mut Config)) -> Value {
        let commit = Commit {
            name: None,
            created: "2026-01-02T03:04:05Z".to_owned(),
            author: None,
            created_by: "sh".to_owned(),
            comment: Some("c".to_owned()),
            change,
        };
        let bytes = configuration(base.as_bytes(), layer, commit).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn members_that_are_not_used_stay() {
        let layer = Digest::of(b"layer");
        let value = committed(BASE, Some(layer), &mut |config| {
            config.cmd = None;
            config.user = Some("app".to_owned());
            config.on_build = Some(vec!["RUN y".to_owned()]);
        });
        assert_eq!(value["extra"], serde_json::json!([1]));
        assert_eq!(value["author"], "first");
        assert_eq!(
            value["config"],
            serde_json::json!({
                "Env": ["A=1"], "User": "app", "OnBuild": ["RUN y"],
                "Healthcheck": {"Test": ["NONE"], "StartInterval": 5}, "Other": 1
            })
        );
        let diff_ids = serde_json::json!(["sha256:00", layer.to_string()]);
        assert_eq!(value["rootfs"]["diff_ids"], diff_ids);
        assert_eq!(
            value["history"][1],
            serde_json::json!({
                "created": "2026-01-02T03:04:05Z", "created_by": "sh", "comment": "c"
            })
        );
    }

    #[test]
    fn without_changes_there_is_no_layer() {
        let value = committed(BASE, None, &mut |_| {});
        assert_eq!(
            value["rootfs"]["diff_ids"],
            serde_json::json!(["sha256:00"])
        );
        assert_eq!(value["history"][1]["empty_layer"], true);
    }

    #[test]
    fn a_base_without_defaults_gets_them() {
        for config in ["", r#""config": null,"#] {
            let base = format!(
                r#"{{{config} "architecture": "amd64", "os": "linux",
                    "rootfs": {{"type": "layers", "diff_ids": []}}}}"#
            );
            let value = committed(&base, None, &mut |config| {
                config.cmd = Some(vec!["x".to_owned()]);
            });
            assert_eq!(value["config"], serde_json::json!({"Cmd": ["x"]}));
        }
    }
}
