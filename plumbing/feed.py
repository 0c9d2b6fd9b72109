"""What a training run is fed with: the micro-batches of every step, from memory or from a stream.

    begin(step, stored)   where to go on; stored: what `gather` made for the checkpoint
    take()                this process's micro-batches of the next step, lists of examples
    position()            where the stream stands now, on this process
    gather(position)      the same of all processes, for a checkpoint

The micro-batches of a run are one sequence, whoever computes them: process r of n takes every n-th, beginning with the
r-th. So four processes see what one process with four times the accumulation sees.
"""

import itertools

import data
import medlm
from parallel import Ranks
from plumbing import streaming


class Encoder:
    """From normal records to micro-batches, as the flags say."""

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.needs_draft = args, tokenizer, False

    def encode(self, records: list[dict], **settings) -> data.Dataset:
        a = self.args
        settings = {"max_length": a.max_length, "insert_eos": a.insert_eos, "chat_template": a.chat_template} | settings
        return data.encode(records, self.tokenizer, **settings)

    def pad(self, examples: list) -> list:
        """ME-DLM's responses end in pads, from which it learns how long an answer is."""
        a = self.args
        if a.method == "editflow" or not a.pad_len:
            return examples
        return [data.pad_response(e, a.pad_len, self.tokenizer.pad_id, a.max_length) for e in examples]

    def check(self, example: data.Example) -> None:
        """Raises now what would be raised in the middle of a step."""
        if self.needs_draft and example.draft is None:
            raise ValueError('--x0_sampler draft: no "draft" field to start from')
        if self.args.method == "medlm" and self.args.intermediate_ratio:
            try:
                medlm.response_text(example.response, medlm.special_tokens(self.tokenizer))
            except ValueError as error:
                start = self.tokenizer.decode(example.response, skip_special=False)[:60]
                raise ValueError(f"{error}: {start!r}...") from None

    def batches(self, examples: list, seed: int, epoch: int) -> list[list]:
        """Micro-batches, lists of examples, in an order drawn from (seed, epoch); for ME-DLM from packed rows of
        max_length tokens."""
        size = self.args.per_device_train_batch_size
        if self.args.method == "editflow":
            return list(data.batches(examples, size, seed, epoch))
        rows = data.pack(examples, self.args.max_length)
        return [[e for row in batch for e in row] for batch in data.batches(rows, size, seed, epoch)]


class Data:
    """Training and validation examples in memory, and the one stream of micro-batches that all processes share."""

    def __init__(self, args, tokenizer, train_records, eval_records, ranks: Ranks):
        self.args, self.ranks, self.encoder = args, ranks, Encoder(args, tokenizer)
        self.group = args.gradient_accumulation_steps * ranks.world  # micro-batches in a step
        self.train = self.encoder.encode(train_records, progress=ranks.is_main)
        held_out = self.encoder.encode(eval_records, recut=False, all_may_be_too_long=True)
        self.eval = self.encoder.pad(held_out.examples)
        for e in self.train.examples + held_out.examples:
            self.encoder.check(e)
        if not len(self.train):
            raise ValueError(f"--dataset_args {args.dataset_args}: nothing to train on")
        if self.train.too_long:
            ranks.say(f"{self.train.too_long} samples longer than --max_length {args.max_length} left out")
        if held_out.too_long:
            ranks.say(f"{held_out.too_long} held-out samples longer than --max_length {args.max_length} left out")
        tokens = sum(len(e) for e in self.rows())
        ranks.say(f"{len(self.train)} examples an epoch, {tokens} tokens; {len(self.eval)} held out")

    def rows(self, epoch: int = 0) -> list:
        return self.encoder.pad(self.train.epoch(self.args.seed, epoch))

    def epoch(self, epoch: int) -> list[list]:
        return self.encoder.batches(self.rows(epoch), self.args.seed, epoch)

    def stream(self, start: int):
        """All micro-batches from number `start` on, epoch after epoch without end: depends on the seed alone."""
        for epoch in itertools.count():
            batches = self.epoch(epoch)
            yield from batches[start:]
            start = max(0, start - len(batches))

    def begin(self, step: int, stored: dict | None) -> None:
        self.micro_batches = self.stream(step * self.group)

    def take(self) -> list[list]:
        """This process's micro-batches of the next step."""
        return [next(self.micro_batches) for _ in range(self.group)][self.ranks.rank :: self.ranks.world]

    def position(self) -> None:
        """The step says it all."""

    def gather(self, position: None) -> None:
        """For a checkpoint."""


class StreamedData:
    """The same for --streaming: micro-batches of a corpus that is never held, and a few examples held out."""

    def __init__(self, args, tokenizer, corpus: streaming.Corpus, ranks: Ranks):
        self.args, self.corpus, self.ranks, self.encoder = args, corpus, ranks, Encoder(args, tokenizer)
        self.group = args.gradient_accumulation_steps * ranks.world
        self.eval = self.encoder.pad(self.encode([("held-out record", r) for r in corpus.held_out]))
        ranks.say(f"{corpus.total / 1e6:.1f} MB in {len(corpus.files)} files, streamed; {len(self.eval)} held out")

    def rows(self) -> list:
        """Some of the examples, from all over the corpus."""
        return self.encode([("sample", record) for record in self.corpus.sample(1 << 20)])

    def encode(self, pool: list[tuple[str, dict]]) -> list:
        examples = []
        for field, more in (("corpus", {"insert_eos": False}), (None, {})):  # a stretch of a .txt has no end
            chosen = [(place, r) for place, r in pool if ("corpus" in r) == (field == "corpus")]
            records = [{"text": r["corpus"]} if field else r for _, r in chosen]
            encoded = self.encoder.encode(records, all_may_be_too_long=True, **more)
            self.corpus.too_long += encoded.too_long
            for e in encoded.examples:
                try:
                    self.encoder.check(e)
                    examples.append(e)
                except ValueError as error:
                    self.corpus.refuse(f"{chosen[0][0]} or one of the {len(chosen) - 1} records after it", error)
        return examples

    def begin(self, step: int, stored: dict | None) -> None:
        def batches_of(pool, rng):
            examples = self.encoder.pad(self.encode(pool))
            return self.encoder.batches(examples, int(rng.integers(2**31)), 0)

        self.corpus.bad = self.corpus.too_long = 0  # samples and held-out records have been counted until here
        self.stream = streaming.Stream(self.corpus, self.ranks, self.group, batches_of, stored, step)
        self.take, self.position = self.stream.take, self.stream.position

    def gather(self, position: dict) -> dict:
        bad, too_long = map(sum, zip(*self.ranks.gather((self.corpus.bad, self.corpus.too_long))))
        if bad or too_long:
            self.ranks.say(f"left out of this run so far: {bad} broken records, {too_long} longer than --max_length")
        return self.stream.gather(position)
