//! Archives of a store's images. A file beside the other modules, because test programs of
//! another crate, which has no features, share those.

use std::fs;
use std::path::PathBuf;

use sm_image::PullOptions;

use crate::support::home::Home;

impl Home {
    pub(crate) fn save(&self, queries: &[&str], file: &str) -> PathBuf {
        let path = self.path(file);
        let queries: Vec<_> = queries.iter().map(|query| (*query).to_owned()).collect();
        let mut out = fs::File::create(&path).unwrap();
        let options = PullOptions::default();
        self.store.save(&queries, &mut out, &options).unwrap();
        path
    }
}
