"""Planning where it counts: candidates timed and checked on the card, remembered, refused."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from card import DEVICE, HAS_CARD, needs_a_card
