"""The columns of a grid's results: a row per cell, which holds the rounds of the cell."""

import pyarrow as pa

from fedelta.protocol.serialization import ByteCount

_SCORES = pa.map_(pa.string(), pa.float64())  # score → value
_BYTES = pa.struct([(name, pa.int64()) for name in ByteCount._fields])
_ROUND = pa.struct(
    [
        ("round", pa.int32()),  # finished rounds
        ("sampled", pa.int32()),  # clients that were sent a message
        ("clients", pa.int32()),  # clients whose updates were used
        ("validation", _SCORES),  # null if the round was not evaluated
        ("train_loss", pa.float64()),
        ("down", _BYTES),  # summed over clients
        ("up", _BYTES),
        ("ranks", pa.map_(pa.string(), pa.int32())),  # rank → number of clients
        ("promoted", pa.list_(pa.string())),
        ("deviation", pa.map_(pa.string(), pa.float32())),  # module → relative deviation
        ("energy", pa.list_(pa.float32())),  # by rank index
        ("patch_width", pa.int32()),
        # Each client's own model before averaging, if evaluation.clients asks for it.
        ("own", pa.list_(pa.struct([("client", pa.string()), ("rank", pa.int32()), ("score", pa.float64())]))),
    ]
)
SCHEMA = pa.schema(
    [
        ("cell", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("metric", pa.string()),  # the score that the cell is judged by
        ("failed", pa.string()),  # why training diverged; null if it did not
        ("test", _SCORES),  # of the final model
        ("validation", _SCORES),
        ("constant_score", pa.float64()),  # score of always giving the same answer; null if meaningless
        ("clients", pa.int32()),
        ("lora_parameters", pa.map_(pa.string(), pa.int64())),  # rank → parameters
        ("base_parameters", pa.int64()),  # of the model without LoRA
        ("rounds", pa.list_(_ROUND)),
        # For each round, module → scaled deviation; empty where it was not measured.
        ("scaled_deviation", pa.list_(pa.map_(pa.string(), pa.float32()))),
        ("config", pa.string()),  # JSON
        ("seconds", pa.float64()),  # summed over rounds
        ("peak_mb", pa.float64()),
        ("finished", pa.string()),
        ("machine", pa.string()),
        ("versions", pa.map_(pa.string(), pa.string())),
        # What the cell has learned from: part → digest and number of rows, as JSON; null in rows of older versions.
        ("inputs", pa.string()),
        ("accepted", pa.list_(pa.string())),  # changes of the inputs that the grid was told to accept
        ("digest", pa.string()),  # of all other fields; null in rows of older versions
    ]
)
