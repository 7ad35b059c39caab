"""Tables in Ray's object store give the rows that an array would."""

import numpy as np
import pytest
from command import start_ray
from support.session import kept_signals

from lsemvae.evaluation.stored import keep


@pytest.mark.ray
def test_rows_of_blocks_are_those_of_an_array_in_the_order_of_the_record_ids(ray_cluster):
    import ray.data

    rng = np.random.default_rng(0)
    id_B = np.array([f"r{number:02d}" for number in rng.permutation(40)])
    h_BF, mask_BL = rng.normal(size=(40, 3)).astype(np.float32), rng.random((40, 2)) < 0.5
    rows = [{"record_id": id_B[b], "h": h_BF[b], "mask": mask_BL[b]} for b in range(40)]
    with kept_signals():
        start_ray()
        kept = keep(ray.data.from_items(rows, override_num_blocks=7), ["record_id"], 40, "embed")
        assert len(kept.blocks) == 7
        assert kept.small.keys() == {"record_id"}
        assert kept.small["record_id"].tolist() == sorted(id_B)
        accepted = np.arange(40) % 5 != 2
        order_B = np.argsort(id_B)[accepted]
        for name, values in (("h", h_BF[order_B]), ("mask", mask_BL[order_B])):
            table = kept.column(name, accepted)
            assert len(table) == 32
            for some in (slice(None), np.array([31, 0, 0, -1]), np.arange(32) < 9, np.array([], dtype=int)):
                found = table[some]
                assert found.dtype == values.dtype and found.flags.writeable
                np.testing.assert_array_equal(found, values[some])
            fewer = table.take(np.array([5, 30, 2]), axis=0)
            np.testing.assert_array_equal(fewer[np.array([1, 0])], values[[30, 5]])
            task = ray.remote(lambda table: table[np.array([3, 20])])
            np.testing.assert_array_equal(ray.get(task.remote(table)), values[[3, 20]])
