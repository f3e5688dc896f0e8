//! Parquet files: columns without pictures whole, pictures one by one.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Repetition;
use parquet::column::reader::ColumnReader;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use crate::EvalError;

/// Most bytes of an encoded picture.
const PICTURE_MAX_BYTES: usize = 256 << 20;
/// Rows that are decoded at once.
const BATCH: usize = 64;

/// A Parquet file.
pub(crate) struct Table {
    path: PathBuf,
    reader: SerializedFileReader<File>,
    /// Rows of each row group.
    groups: Vec<usize>,
    /// The group and row behind the last picture that was read, and what goes on there.
    open: Option<(usize, usize, ColumnReader)>,
}

impl Table {
    pub(crate) fn open(path: &Path) -> Result<Self, EvalError> {
        let file = File::open(path).map_err(EvalError::io(path))?;
        let reader = guarded(path, || SerializedFileReader::new(file))?;
        let mut groups = Vec::new();
        for group in reader.metadata().row_groups() {
            let rows = usize::try_from(group.num_rows());
            groups
                .push(rows.map_err(|_| table(path, "a row group has a negative number of rows"))?);
        }
        Ok(Self {
            path: path.to_owned(),
            reader,
            groups,
            open: None,
        })
    }

    fn fields(&self) -> &[Arc<Type>] {
        let schema = self.reader.metadata().file_metadata().schema();
        match schema.is_group() {
            true => schema.get_fields(),
            false => &[],
        }
    }

    pub(crate) fn has(&self, column: &str) -> bool {
        self.fields().iter().any(|field| field.name() == column)
    }

    fn no_column(&self, column: &'static str) -> EvalError {
        let names: Vec<&str> = self.fields().iter().map(|field| field.name()).collect();
        EvalError::NoColumn {
            path: self.path.clone(),
            column,
            found: names.join(", "),
        }
    }

    /// Reads columns row by row; those that are not needed but there come last.
    pub(crate) fn rows(
        &self,
        needed: &[&'static str],
        optional: &[&'static str],
        each: &mut dyn FnMut(Cells<'_>) -> Result<(), EvalError>,
    ) -> Result<(), EvalError> {
        if let Some(missing) = needed.iter().find(|column| !self.has(column)) {
            return Err(self.no_column(missing));
        }
        let wanted =
            |field: &&Arc<Type>| needed.contains(&field.name()) || optional.contains(&field.name());
        let fields = self.fields().iter().filter(wanted).cloned().collect();
        let mut rows = guarded(&self.path, || {
            let name = self.reader.metadata().file_metadata().schema().name();
            let projection = Type::group_type_builder(name).with_fields(fields).build()?;
            let rows = RowIter::from_file(Some(projection), &self.reader)?;
            Ok(rows.with_batch_size(BATCH))
        })?;
        let mut count = 0;
        while let Some(row) = guarded(&self.path, || rows.next().transpose())? {
            let path = &self.path;
            each(Cells {
                path,
                row: count,
                values: row,
            })?;
            count += 1;
        }
        match count == self.groups.iter().sum::<usize>() {
            true => Ok(()),
            false => Err(table(&self.path, "it has fewer rows than it says")),
        }
    }

    /// Whether there are pictures.
    pub(crate) fn check_pictures(&self) -> Result<(), EvalError> {
        self.picture_column().map(drop)
    }

    /// The column of encoded pictures: `image` itself, or its field `bytes`.
    fn picture_column(&self) -> Result<usize, EvalError> {
        let columns = self.reader.metadata().file_metadata().schema_descr();
        let is_picture = |column: &&parquet::schema::types::ColumnDescPtr| {
            let path: Vec<&str> = column.path().parts().iter().map(String::as_str).collect();
            matches!(path[..], ["image"] | ["image", "bytes"])
        };
        let found = columns
            .columns()
            .iter()
            .position(|column| is_picture(&column));
        let found = found.ok_or_else(|| self.no_column("image (with its bytes)"))?;
        let column = columns.column(found);
        let is_bytes = column.physical_type() == parquet::basic::Type::BYTE_ARRAY;
        let repeats = column.self_type().get_basic_info();
        let is_repeated = repeats.has_repetition() && repeats.repetition() == Repetition::REPEATED;
        match is_bytes && !is_repeated && column.max_rep_level() == 0 {
            true => Ok(found),
            false => Err(EvalError::Value {
                path: self.path.clone(),
                row: 0,
                column: column.path().string(),
                wanted: "the bytes of an encoded picture",
            }),
        }
    }

    /// The encoded picture of a row; cheapest in order.
    pub(crate) fn picture(&mut self, row: usize) -> Result<Vec<u8>, EvalError> {
        let column = self.picture_column()?;
        let (mut group, mut within) = (0, row);
        while self.groups.get(group).is_some_and(|&rows| within >= rows) {
            within -= self.groups[group];
            group += 1;
        }
        let (mut at, mut reader) = match self.open.take() {
            Some((open, at, reader)) if open == group && at <= within => (at, reader),
            _ => {
                let reader = guarded(&self.path, || {
                    self.reader.get_row_group(group)?.get_column_reader(column)
                });
                (0, reader?)
            }
        };
        let ColumnReader::ByteArrayColumnReader(bytes) = &mut reader else {
            return Err(table(&self.path, "its pictures are no bytes"));
        };
        let read = guarded(&self.path, || {
            let skipped = bytes.skip_records(within - at)?;
            if skipped < within - at {
                return Err(ParquetError::EOF("it ends before its last picture".into()));
            }
            let (mut values, mut levels) = (Vec::new(), Vec::new());
            let (records, ..) = bytes.read_records(1, Some(&mut levels), None, &mut values)?;
            match records {
                1 => Ok(values.pop()),
                _ => Err(ParquetError::EOF("it ends before its last picture".into())),
            }
        })?;
        at = within + 1;
        self.open = Some((group, at, reader));
        let value = |wanted| EvalError::Value {
            path: self.path.clone(),
            row,
            column: "image".into(),
            wanted,
        };
        match read {
            Some(bytes) if bytes.len() > PICTURE_MAX_BYTES => {
                Err(value("a picture of at most 256 MiB"))
            }
            Some(bytes) => Ok(bytes.data().to_vec()),
            None => Err(value("a picture; it is null")),
        }
    }
}

fn table(path: &Path, reason: impl Into<String>) -> EvalError {
    EvalError::Table {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

/// Damage that the reader itself does not expect is an error like any other.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, EvalError> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(error)) => Err(table(path, error.to_string())),
        Err(_) => Err(table(path, "it is damaged")),
    }
}

/// The values of a row.
pub(crate) struct Cells<'a> {
    path: &'a Path,
    /// Counted from 0.
    pub(crate) row: usize,
    values: Row,
}

impl Cells<'_> {
    fn get(&self, column: &str) -> Option<&Field> {
        let mut columns = self.values.get_column_iter();
        let found = columns.find(|(name, _)| *name == column);
        found.map(|(_, field)| field)
    }

    fn wrong(&self, column: &str, wanted: &'static str) -> EvalError {
        EvalError::Value {
            path: self.path.to_owned(),
            row: self.row,
            column: column.into(),
            wanted,
        }
    }

    /// That a value is not what it should be.
    pub(crate) fn refuse(&self, column: &str, wanted: &'static str) -> EvalError {
        self.wrong(column, wanted)
    }

    pub(crate) fn text(&self, column: &str) -> Result<String, EvalError> {
        match self.get(column) {
            Some(Field::Str(text)) => Ok(text.clone()),
            _ => Err(self.wrong(column, "text")),
        }
    }

    /// A name, which may be a number, or missing.
    pub(crate) fn name(&self, column: &str) -> Option<String> {
        match self.get(column)? {
            Field::Str(text) => Some(text.clone()),
            Field::Int(number) => Some(number.to_string()),
            Field::Long(number) => Some(number.to_string()),
            Field::UInt(number) => Some(number.to_string()),
            Field::ULong(number) => Some(number.to_string()),
            _ => None,
        }
    }

    fn list(&self, column: &str, wanted: &'static str) -> Result<&[Field], EvalError> {
        match self.get(column) {
            Some(Field::ListInternal(list)) => Ok(list.elements()),
            _ => Err(self.wrong(column, wanted)),
        }
    }

    pub(crate) fn texts(&self, column: &str) -> Result<Vec<String>, EvalError> {
        const WANTED: &str = "a list of texts";
        let texts = self.list(column, WANTED)?.iter();
        let text = |field: &Field| match field {
            Field::Str(text) => Ok(text.clone()),
            _ => Err(self.wrong(column, WANTED)),
        };
        texts.map(text).collect()
    }

    pub(crate) fn numbers(
        &self,
        column: &str,
        wanted: &'static str,
    ) -> Result<Vec<f64>, EvalError> {
        let numbers = self.list(column, wanted)?.iter();
        let number = |field: &Field| match field {
            Field::Double(number) => Some(*number),
            Field::Float(number) => Some(f64::from(*number)),
            Field::Int(number) => Some(f64::from(*number)),
            Field::Long(number) => Some(*number as f64),
            Field::Float16(number) => Some(number.to_f64()),
            Field::Byte(number) => Some(f64::from(*number)),
            Field::Short(number) => Some(f64::from(*number)),
            Field::UByte(number) => Some(f64::from(*number)),
            Field::UShort(number) => Some(f64::from(*number)),
            Field::UInt(number) => Some(f64::from(*number)),
            Field::ULong(number) => Some(*number as f64),
            _ => None,
        };
        let finite = |number: &f64| number.is_finite();
        numbers
            .map(|field| {
                let number = number(field).filter(finite);
                number.ok_or_else(|| self.wrong(column, wanted))
            })
            .collect()
    }
}
