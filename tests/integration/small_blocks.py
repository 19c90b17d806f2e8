"""k-NN with batches and blocks so small that every rank has some. Each rank prints its result and number of batches.

python -m small_blocks WEIGHTS TRAIN VAL
"""

import json
import sys

from pipeline.evals.knn import knn

if __name__ == "__main__":
    batches = []
    result = knn(*sys.argv[1:], batch=16, block=8, heartbeat=lambda: batches.append(1))
    print(json.dumps({"result": result, "batches": len(batches)}))
