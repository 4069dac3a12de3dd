"""The lab: a procedural 3-D world whose truth is known exactly, so that claims can be measured.

In three lines:

    from minipic.world.scene import render, sample_scene
    scene = sample_scene(seed=0, index=7)
    image = render(scene).rgb                       # [1,3,64,64] in [-1,1]

A reading order, where each line builds on those above it:

    camera    solids    raycast     where a camera's rays go, what they meet, what is in shadow
    scene                           scenes of one to three solids, drawn at random, and `render`
    caption   edits                 a scene in words and back; "make the cube green"
    maps      styles                depth, edges, ... as pictures; other ways to draw a scene
    tasks     pictures              pairs of a given and a wanted picture; what recipes train on
    probe     metrics               the judge, a network that reads pictures; scores
"""
