"""Local text as a TFDS data set of ArrayRecord files, built and read without TensorFlow.

prepare("notes", ["~/notes/*.md"])  # writes TFDS_DATA_DIR/local_text/notes
DataConfig(sources=("tfds:local_text/notes",))

ArrayRecord gives any document in one seek, where a .gz file or a large Parquet file cannot.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from lm_jax.config import DataConfig
from lm_jax.data.sources import Texts, all_documents
from lm_jax.errors import UserError


@dataclasses.dataclass(kw_only=True)
class LocalTextConfig(tfds.core.BuilderConfig):
    """What a prepared data set is made of: the documents of each split."""

    documents: dict[str, Sequence[str]] = dataclasses.field(default_factory=dict)


class LocalText(tfds.core.GeneratorBasedBuilder):
    """Documents of local text files, JSON lines or Parquet: {'text': Text()}."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, file_format: Any = tfds.core.FileFormat.ARRAY_RECORD, **kwargs: Any):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documents of local files.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,  # the order of the files; lm_jax shuffles when it reads
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager  # nothing is downloaded
        return {
            split: self._generate_examples(found)
            for split, found in self.builder_config.documents.items()
        }

    def _generate_examples(self, documents: Sequence[str]) -> Iterator[tuple[int, Any]]:
        for i in range(len(documents)):
            if text := documents[i]:
                yield i, {"text": text}


def prepare(
    name: str,
    sources: Sequence[str],
    data_dir: str | None = None,
    *,
    validation_sources: Sequence[str] = (),
    document: str = "file",
    text_key: str = "text",
    on_error: str = "raise",
) -> str:
    """Builds the data set local_text/NAME from `sources`, and returns the source that reads it.

    Args:
      sources: as `DataConfig.sources`; split 'train' holds all of their documents.
      data_dir: where data sets lie; None: TFDS_DATA_DIR, or ~/tensorflow_datasets. The returned
        source is looked up there, so TFDS_DATA_DIR must name the same folder when it is read.
      validation_sources: split 'validation', which `DataConfig.validation_sources` reads.

    Raises:
      UserError: a source cannot be read, or the data set is there already.
    """
    splits = {"train": tuple(sources), "validation": tuple(validation_sources)}
    found = {}
    for split, paths in splits.items():
        if paths:
            config = DataConfig(paths, document=document, text_key=text_key, on_error=on_error)
            found[split] = Texts(all_documents(config))
    builder = LocalText(
        config=LocalTextConfig(name=name, version="1.0.0", documents=found), data_dir=data_dir
    )
    if builder.data_path.exists():
        raise UserError(f"{builder.data_path} is there already: remove it, or choose another name")
    builder.download_and_prepare()
    return f"tfds:local_text/{name}"
