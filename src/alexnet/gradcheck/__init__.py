"""Proof that every hand-derived gradient is right, ours or the reader's: what scripts/check_gradients.py runs.

    cases       what an operation is checked on, and how large its rounding errors can be
    operations  the ten of them, with their cases
    checks      a) central differences  b) autograd of the native operation  c) analytic identities
    network     d) the whole network along random directions, every parameter  e) ten training steps
    rules       the same for update rule, initialisation and data path, which have no backward but can be as wrong
    mutants     wrong versions of the shipped functions, and the check that kills each
    run         all of it, as one table and results.json
    lesson      the HTML page a learner reads; derivation turns the docstrings of the layer files into its chapters,
                figures draws, mathematics computes the numbers of map.md, walk those of one image
    exercises   the reader writes a gradient (exercises.md); reader proves it; diagnosis names the mistake

Read `checks` first: it is the argument; the rest is what it is applied to.
"""
