"""Score an exported adapter with plain PEFT: nothing of fedelta is imported here.

    python examples/score_with_peft.py BASE ROWS.jsonl --classes 8 --adapter runs/my/adapter
    python examples/score_with_peft.py runs/my-merged ROWS.jsonl

ROWS.jsonl has a line {"text": …, "label": class index} for each text.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("rows", type=Path)
parser.add_argument("--classes", type=int, help="number of classes, for a base model without a head")
parser.add_argument("--adapter")
parser.add_argument("--max-length", type=int, default=128)
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.base)
head = {"num_labels": arguments.classes} if arguments.classes else {}
model = AutoModelForSequenceClassification.from_pretrained(arguments.base, **head)
if model.config.pad_token_id is None:
    model.config.pad_token_id = tokenizer.pad_token_id
if arguments.adapter:
    model = PeftModel.from_pretrained(model, arguments.adapter)
model.eval()

rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
right = 0
with torch.no_grad():
    for row in rows:
        tokens = tokenizer(row["text"], truncation=True, max_length=arguments.max_length, return_tensors="pt")
        right += int(model(**tokens).logits.argmax()) == row["label"]
print(f"accuracy {right / len(rows):.6f} on {len(rows)} texts")
