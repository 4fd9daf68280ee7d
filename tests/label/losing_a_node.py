"""Labels on a cluster of a small head and a larger node, kills the node at work, later lets another join.

`python -m tests.label.losing_a_node SHARDS OUTPUT` ends with the number of labelled images.
"""

import logging
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from dfa.data.shards import load_index
from dfa.label import factory
from tests.label.colours import colour_pass, colour_plan


def main(shards: str, output: str) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, logging_level=logging.WARNING)
    node = cluster.add_node(num_cpus=3)
    cluster.wait_for_nodes()
    done: list[int] = []

    def label() -> None:
        plan = colour_plan(colour_pass(load_index(shards), output), batch_images=4)
        done.append(factory.run(plan)["colours"].report.num_samples)

    worker = threading.Thread(target=label)
    worker.start()
    while not list(Path(output).glob("shard-*.json")):
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    print("node killed", flush=True)
    time.sleep(2)
    cluster.add_node(num_cpus=1)
    worker.join()
    print(done[0], flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
