//! Settings of image and video processors, in whichever file a release of transformers keeps them.

use serde::de::{DeserializeOwned, Error};
use serde_json::{Map, Value};

use crate::{CONFIG_MAX_BYTES, CheckpointError, Folder};

/// Since transformers 5 one file has the settings of all; before, only those of the processor around them.
const PROCESSOR: &str = "processor_config.json";
const IMAGES: &str = "preprocessor_config.json";
const VIDEOS: &str = "video_preprocessor_config.json";

/// Settings, and where they were found.
#[derive(Debug, Clone)]
pub struct ProcessorSettings<T> {
    /// The settings.
    pub settings: T,
    /// Name of the file, or of the part of a file, for messages.
    pub place: &'static str,
}

impl Folder {
    /// Settings of the image processor: `image_processor` in `processor_config.json`, else
    /// `preprocessor_config.json`, as transformers 5 looks for them.
    ///
    /// # Errors
    /// [`CheckpointError::MissingFile`] if neither is there.
    pub fn image_processor<T: DeserializeOwned>(
        &self,
    ) -> Result<ProcessorSettings<T>, CheckpointError> {
        match self.nested(
            "image_processor",
            "image_processor in processor_config.json",
        )? {
            Some(nested) => Ok(nested),
            None => Ok(ProcessorSettings {
                settings: self.read_json(IMAGES, CONFIG_MAX_BYTES)?,
                place: IMAGES,
            }),
        }
    }

    /// Settings of the video processor: `video_processor` in `processor_config.json`, else
    /// `video_preprocessor_config.json`; `None` if neither is there.
    pub fn video_processor<T: DeserializeOwned>(
        &self,
    ) -> Result<Option<ProcessorSettings<T>>, CheckpointError> {
        match self.nested(
            "video_processor",
            "video_processor in processor_config.json",
        )? {
            None if self.has(VIDEOS) => Ok(Some(ProcessorSettings {
                settings: self.read_json(VIDEOS, CONFIG_MAX_BYTES)?,
                place: VIDEOS,
            })),
            nested => Ok(nested),
        }
    }

    fn nested<T: DeserializeOwned>(
        &self,
        key: &str,
        place: &'static str,
    ) -> Result<Option<ProcessorSettings<T>>, CheckpointError> {
        if !self.has(PROCESSOR) {
            return Ok(None);
        }
        let mut file: Map<String, Value> = self.read_json(PROCESSOR, CONFIG_MAX_BYTES)?;
        let settings = match file.remove(key) {
            None | Some(Value::Null) => return Ok(None),
            Some(nested @ Value::Object(_)) => serde_json::from_value(nested),
            Some(_) => Err(serde_json::Error::custom(format!("{key} is no object"))),
        };
        let settings = settings.map_err(|source| CheckpointError::Json {
            file: self.path_of(PROCESSOR),
            source,
        })?;
        Ok(Some(ProcessorSettings { settings, place }))
    }
}
