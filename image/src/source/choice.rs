//! Selection of one of several images at one location.

use crate::docker_reference::DockerReference;
use crate::error::{Cause, ErrorKind};

/// Selection of an image (containers-transports(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// The only image.
    Only,
    /// The image with this name.
    Name(String),
    /// The image with this index, from 0: `@N`.
    Number(usize),
}

impl Choice {
    /// Parses the part of a reference after the path.
    pub(super) fn of(tag: Option<&str>) -> Self {
        let Some(tag) = tag else {
            return Self::Only;
        };
        let number = tag.strip_prefix('@').and_then(|number| number.parse().ok());
        number.map_or_else(|| Self::Name(tag.to_owned()), Self::Number)
    }

    /// Returns the index of the selected image among images with these names.
    ///
    /// # Errors
    /// No or several images match. The sentence lists the names, unless an image is selected
    /// by a number that does not exist.
    pub(super) fn among(&self, images: &[Vec<String>]) -> Result<usize, Cause> {
        let meant = self.all_among(images)?;
        match (meant.as_slice(), self) {
            ([one], _) => Ok(*one),
            (_, Self::Name(name)) => Err(Cause::new(
                ErrorKind::Ambiguous,
                format!("it has several images \"{name}\"; {}", listed(images)),
            )),
            _ => Err(Cause::new(
                ErrorKind::Ambiguous,
                format!(
                    "there are {} images in it, add :NAME or :@NUMBER; {}",
                    images.len(),
                    listed(images)
                ),
            )),
        }
    }

    /// As [`Self::among`], where several matches can be one image for several platforms.
    ///
    /// # Errors
    /// No image matches.
    pub(super) fn all_among(&self, images: &[Vec<String>]) -> Result<Vec<usize>, Cause> {
        match self {
            _ if images.is_empty() => Err("there is no image in it".into()),
            Self::Only => Ok((0..images.len()).collect()),
            Self::Number(number) if *number < images.len() => Ok(vec![*number]),
            Self::Number(number) => Err(format!(
                "there is no image @{number} in it, but {} of them",
                images.len()
            )
            .into()),
            Self::Name(name) => {
                // A name matches exactly, in Docker's sense, or by the tag alone.
                let kinds: [&dyn Fn(&str) -> bool; 3] = [
                    &|known| known == name,
                    &|known| is_same(known, name),
                    &|known| known.rsplit_once(':').is_some_and(|(_, tag)| tag == name),
                ];
                let named = |is_meant: &dyn Fn(&str) -> bool| -> Vec<usize> {
                    let images = (0..).zip(images);
                    let meant = images.filter(|(_, names)| names.iter().any(|it| is_meant(it)));
                    meant.map(|(number, _)| number).collect()
                };
                let meant = kinds.into_iter().map(named).find(|meant| !meant.is_empty());
                meant
                    .ok_or_else(|| format!("it has no image \"{name}\"; {}", listed(images)).into())
            }
        }
    }
}

fn listed(images: &[Vec<String>]) -> String {
    let names: Vec<&str> = images.iter().flatten().map(String::as_str).collect();
    match names.as_slice() {
        [] => "none has a name".to_owned(),
        names => format!("there are {}", names.join(", ")),
    }
}

fn is_same(one: &str, other: &str) -> bool {
    let parse = |text| DockerReference::parse(text).ok();
    parse(one).is_some_and(|one| Some(one) == parse(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_distinguished() {
        let images: Vec<Vec<String>> = [&["app:v1", "r.example/app:v1"][..], &["app:v2"], &[]]
            .iter()
            .map(|names| names.iter().map(|name| (*name).to_owned()).collect())
            .collect();
        let among = |tag: Option<&str>| Choice::of(tag).among(&images);
        assert_eq!(among(Some("app:v1")), Ok(0));
        assert_eq!(among(Some("docker.io/library/app:v2")), Ok(1));
        assert_eq!(among(Some("v2")), Ok(1));
        assert_eq!(among(Some("@2")), Ok(2));
        let error = |tag| among(tag).unwrap_err().to_string();
        assert!(error(None).contains("3 images in it"));
        assert!(error(Some("@3")).contains("no image @3"));
        assert!(error(Some("app")).contains("no image \"app\"; there are app:v1"));
        assert_eq!(Choice::Only.among(&images[..1]), Ok(0));
        assert!(
            Choice::Only
                .among(&[])
                .unwrap_err()
                .to_string()
                .contains("no image in it")
        );
        let twice = vec![vec!["a:x".to_owned()], vec!["b:x".to_owned()]];
        let error = Choice::of(Some("x")).among(&twice).unwrap_err();
        assert!(error.to_string().contains("several images"), "{error}");
    }
}
