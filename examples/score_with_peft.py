"""Score an exported adapter or merged model with plain PEFT and transformers. This script does not import fedelta.

    python examples/score_with_peft.py BASE ROWS.jsonl --classes 8 --adapter runs/my/adapter
    python examples/score_with_peft.py runs/my-merged ROWS.jsonl

ROWS.jsonl has one line per text: {"text": …, "label": class index}.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

parser = argparse.ArgumentParser(description="Print the accuracy of a classification model.")
parser.add_argument("base", help="folder or hub name of the base model, or folder of a merged model")
parser.add_argument("rows", type=Path, help="JSONL file of texts and class indices")
parser.add_argument("--classes", type=int, help="number of classes, for a base model without a head")
parser.add_argument("--adapter", help="PEFT folder of the adapter")
parser.add_argument("--max-length", type=int, default=128, help="longest text, in tokens")
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
correct = 0
with torch.no_grad():
    for row in rows:
        tokens = tokenizer(row["text"], truncation=True, max_length=arguments.max_length, return_tensors="pt")
        correct += int(model(**tokens).logits.argmax()) == row["label"]
print(f"accuracy {correct / len(rows):.6f} on {len(rows)} texts")
