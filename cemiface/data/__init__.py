"Sets of faces and of pairs. The further forms add themselves to the doors of `records`, `pairs` and `convert`."
from . import forms, joined, lmdb_files, shards
