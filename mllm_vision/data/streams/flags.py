"""The flags of a streamed data set, shared by the recipes. Nothing here imports torch before a stream is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass
class StreamArguments:
    """How training data is streamed, instead of loaded as a whole.

    Raises:
        ValueError: a flag of streams without `streaming`; a number out of range.
    """

    rare: ClassVar[bool] = True  # listed by `--help all`

    streaming: bool = field(
        default=False, metadata={"help": "Read Parquet or WebDataset shards in a shuffled stream, without an index."}
    )
    mix_datasets: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "More data sets with weights beside dataset_name's 1: b/*.tar=0.5,c.parquet=0.25"},
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Rows that a stream is shuffled among, over all processes; 0: file order."}
    )
    stream_lanes: int = field(
        default=8,
        metadata={
            "help": "Shards read at once, over all processes; best a multiple of the number of processes.",
            "aliases": ["stream_readers"],
        },
    )

    def __post_init__(self) -> None:
        if not self.streaming and self.mix_datasets:
            raise ValueError("--mix_datasets is for streams: add --streaming, or leave it out")
        if self.shuffle_buffer < 0 or self.stream_lanes < 1:
            raise ValueError(
                f"shuffle_buffer={self.shuffle_buffer} must not be negative, and stream_readers={self.stream_lanes} at "
                "least 1"
            )
        for name, weight in self.mix_datasets.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
                raise ValueError(f"--mix_datasets {name}={weight!r}: a weight is a positive number")

    def open(
        self,
        name: str,
        *,
        split: str = "train",
        config_name: str | None = None,
        max_rows: int | None = None,
        image_root: str | None = None,
        seed: int = 0,
        max_steps: int = -1,
    ) -> Any:
        """The `Stream` these flags ask for.

        Raises:
            ValueError: `max_rows` or `config_name`, which streams have not; no `max_steps` where a pass has no known
                end. Also what `Stream.open` raises.
        """
        from mllm_vision.data.streams.streams import Stream

        if max_rows is not None:
            raise ValueError(f"max_train_samples={max_rows} needs the rows counted: leave it out, and give --max_steps")
        if config_name is not None:
            raise ValueError(
                f"dataset_config_name={config_name!r}: a stream reads files; name them ({name}/{config_name}/*.parquet)"
            )
        stream = Stream.open(
            name,
            split=split,
            mix=self.mix_datasets,
            image_root=image_root,
            seed=seed,
            shuffle_buffer=self.shuffle_buffer,
            readers=self.stream_lanes,
        )
        if max_steps <= 0 and not stream.bounded:
            raise ValueError(
                "this stream has no known length (weights, or shards on the Hub), so it has no epochs: "
                "say how long to train with --max_steps"
            )
        return stream
