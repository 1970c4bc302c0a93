"""How fast each part is, beside every baseline worth having (scripts/benchmark.py).

    layers       response norm, the block of ReLU, norm and pool, each convolution and its gradients
    step         one training step of a whole network
    data         store -> augmented batch
    end_to_end   images -> trained network: bare loop, Lightning, and the usual pipeline of JPEG files
    memory       peak memory of a step, one fresh process per variant
    gpu          a step and the norms on one CUDA device, captured beside eager; not in `all`

Rules. All contestants of a row run in one process, in turn (A B C A B C ...), on the same allocator; the median over
the rounds counts, and the spread is shown. The first call, which compiles, is timed apart. Before anything is timed,
each layer of ours is compared with the reference, and the reference with the stock modules. All contestants of a row
compute in the same precision. Headline ratios are against the *best* baseline of the row; "as people run it" is stock
eager (with autocast for bfloat16) in a fresh process with the default allocator. A bound is what this machine could do
at best, measured between the rounds of the same run; a row that beats its bound says so. Rows that we lose stay.
"""
