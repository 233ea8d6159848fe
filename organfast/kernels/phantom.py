"""Implicit shapes -> labels (Numba, cached). Arrays and numbers only; nothing is checked here.

A *frame* maps voxel (j, i, k) to reference mm, the coordinates in which the anatomy is described;
a lattice of displacements bends them. A slice is first laid out as air, skin, fat, wall and
cavity from polar radii around the axis (0, AXIS_Y, z), then each shape claims the voxels inside it
whose present label it may replace.

A shape is a run of rows: first its *fences*, all of which a voxel must be within, then its
*solids*, folded from left to right. Each row gives a signed distance in mm, negative inside::

    kind            parameters (columns 3..)
    0 ellipsoid     centre 3..5, turn 6..14 (rows), 1 / radii 15..17
    1 block         the same with exponent 4: flat faces, round edges
    2 drum          the same, an elliptic cylinder along its third axis
    3 cone          start 3..5, span 6..8, start radius 9, growth 10, 1 / |span|^2 11, squash 12..14
    4 half-space    fence: normal 3..5, offset 6; within where normal . p < offset
    5 cavity        fence: within where side (4) * distance beyond the cavity's wall < column 3
    6 diaphragm     fence: within where side (4) * height above the diaphragm < column 3

Column 1 is the fold (0 union, 1 subtract, 2 intersect), column 2 the rounding of the fold in mm.
"""

# Compiled functions take arrays whose layout Numba specialises on: no annotation says that.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

# Numba's cache does not notice a change in another file: after one there, touch this file.
from organfast.kernels.painting import sample_texture

AXIS_Y = 45.0
"""Reference y (mm) of the axis around which polar radii are measured."""

ARMS_FROM_Z = 200.0
"""Below this reference height (mm) nothing lies outside the body's outline."""

RELIEF_REACH = 2.5
"""Relief moves a surface by at most this many amplitudes."""


@njit(cache=True, nogil=True)
def quick_angle(y, x):
    """atan2 in turns, 0..1, to 2e-5 of a turn (Hastings' polynomial)."""
    ax, ay = abs(x), abs(y)
    big, small = max(ax, ay), min(ax, ay)
    if big == 0.0:
        return 0.0
    t = small / big
    s = t * t
    turn = ((-0.0464964749 * s + 0.15931422) * s - 0.327622764) * s * t + t
    turn *= 0.15915494309189535
    if ay > ax:
        turn = 0.25 - turn
    if x < 0:
        turn = 0.5 - turn
    if y < 0:
        turn = 1.0 - turn
    return turn if turn < 1.0 else 0.0


@njit(cache=True, nogil=True)
def polar_radii(radii, level, turn):
    """Linear interpolation of ``radii[level, angle]`` at (fractional level, turn 0..1).

    radii : (n_levels, n_angles, 3) float32, mm: cavity, muscle, skin. Returns the three.
    """
    n_levels, n_angles = radii.shape[:2]
    z = min(max(level, 0.0), n_levels - 1.0)
    k = min(int(z), n_levels - 2)
    w = z - k
    a = turn * n_angles
    j = int(a)
    v = a - j
    j1 = j + 1 if j + 1 < n_angles else 0
    w00, w01, w10, w11 = (1 - w) * (1 - v), (1 - w) * v, w * (1 - v), w * v
    cavity = w00 * radii[k, j, 0] + w01 * radii[k, j1, 0]
    cavity += w10 * radii[k + 1, j, 0] + w11 * radii[k + 1, j1, 0]
    muscle = w00 * radii[k, j, 1] + w01 * radii[k, j1, 1]
    muscle += w10 * radii[k + 1, j, 1] + w11 * radii[k + 1, j1, 1]
    skin = w00 * radii[k, j, 2] + w01 * radii[k, j1, 2]
    skin += w10 * radii[k + 1, j, 2] + w11 * radii[k + 1, j1, 2]
    return cavity, muscle, skin


@njit(cache=True, nogil=True)
def wall_layer(radius, bounds, ripples):
    """Layer of the body at a radius: 0 air, 1 skin, 2 fat, 3 muscle, 4 fat plane, 5 cavity.

    bounds: radii of cavity, muscle and skin, mm. Fat planes run roughly along the wall, two or
    three deep, bent and broken off by two texture values, the ripples.
    """
    cavity, muscle, skin = bounds
    if radius >= skin:
        return 0
    if radius >= skin - 1.8:
        return 1
    if radius >= muscle:
        return 2
    if radius < cavity:
        return 5
    pitch = max(11.0, 0.42 * (muscle - cavity))
    sheet = (radius - cavity) / pitch + 0.55 * ripples[0]
    distance = abs(sheet - np.floor(sheet) - 0.5) * pitch
    return 4 if distance < 0.6 + 1.3 * ripples[1] and radius - cavity > 2.5 else 3


@njit(cache=True, nogil=True)
def dome_height(x, y, fraction, dome):
    """Height (z, mm) of the diaphragm; fraction = radius / radius of the cavity's wall.

    dome: centre, right rise, left rise, posterior edge, anterior edge.
    """
    right = (x - 68.0) / 50.0
    left = (x + 72.0) / 48.0
    peak = dome[0] + dome[1] * np.exp(-right * right) + dome[2] * np.exp(-left * left)
    distance = np.sqrt(x * x + (y - AXIS_Y) * (y - AXIS_Y)) + 1e-3
    front = 0.5 + 0.5 * (y - AXIS_Y) / distance
    edge = dome[3] + (dome[4] - dome[3]) * front * np.sqrt(front)
    s = fraction * fraction
    return edge + (peak - edge) * np.sqrt(max(0.0, 1.0 - s * s))


@njit(cache=True, nogil=True)
def solid_distance(x, y, z, rows, n):
    """Approximate signed distance (mm) to the solid of row n."""
    x, y, z = x - rows[n, 3], y - rows[n, 4], z - rows[n, 5]
    kind = rows[n, 0]
    if kind == 3:
        x, y, z = x * rows[n, 12], y * rows[n, 13], z * rows[n, 14]
        t = (x * rows[n, 6] + y * rows[n, 7] + z * rows[n, 8]) * rows[n, 11]
        t = min(max(t, 0.0), 1.0)
        x, y, z = x - t * rows[n, 6], y - t * rows[n, 7], z - t * rows[n, 8]
        return np.sqrt(x * x + y * y + z * z) - rows[n, 9] - t * rows[n, 10]
    ra, rb, rc = rows[n, 15], rows[n, 16], rows[n, 17]
    a = (rows[n, 6] * x + rows[n, 7] * y + rows[n, 8] * z) * ra
    b = (rows[n, 9] * x + rows[n, 10] * y + rows[n, 11] * z) * rb
    c = (rows[n, 12] * x + rows[n, 13] * y + rows[n, 14] * z) * rc
    if kind == 2:
        side = (np.sqrt(a * a + b * b) - 1.0) / max(ra, rb)
        cap = (abs(c) - 1.0) / rc
        h = max(4.0 - abs(side - cap), 0.0) * 0.25
        return max(side, cap) + h * h
    if kind == 0:
        q = np.sqrt(a * a + b * b + c * c)
        a, b, c = a * ra, b * rb, c * rc
        bend = q
    else:
        a2, b2, c2 = a * a, b * b, c * c
        q = np.sqrt(np.sqrt(a2 * a2 + b2 * b2 + c2 * c2))
        a, b, c = a2 * a * ra, b2 * b * rb, c2 * c * rc
        bend = q * q * q
    if q < 1e-2:
        return -1.0 / max(ra, rb, rc)
    return (q - 1.0) * bend / np.sqrt(a * a + b * b + c * c)


@njit(cache=True, nogil=True)
def fence_distance(x, y, z, beyond, above, rows, n):
    """Signed distance (mm) to the fence of row n."""
    kind = rows[n, 0]
    if kind == 4:
        return rows[n, 3] * x + rows[n, 4] * y + rows[n, 5] * z - rows[n, 6]
    return rows[n, 4] * (beyond if kind == 5 else above) - rows[n, 3]


@njit(cache=True, nogil=True)
def fold_solids(x, y, z, rows, first, last):
    """Signed distance (mm) to rows first..last of solids, folded from left to right."""
    whole = solid_distance(x, y, z, rows, first)
    for n in range(first + 1, last):
        d = solid_distance(x, y, z, rows, n)
        rounding = rows[n, 2]
        if rows[n, 1] == 0:
            h = max(rounding - abs(whole - d), 0.0)
            whole = min(whole, d) - h * h * 0.25 / rounding
        else:
            if rows[n, 1] == 1:
                d = -d
            h = max(rounding - abs(whole - d), 0.0)
            whole = max(whole, d) + h * h * 0.25 / rounding
    return whole


@njit(cache=True, nogil=True)
def lattice_page(lattice, level, out):
    """The lattice (n_z, n_y, n_x, 3) of displacements at a fractional level, (n_y, n_x, 3)."""
    z = min(max(level, 0.0), lattice.shape[0] - 1.001)
    k = int(z)
    w = np.float32(z - k)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            for c in range(3):
                out[i, j, c] = (1 - w) * lattice[k, i, j, c] + w * lattice[k + 1, i, j, c]


@njit(cache=True, nogil=True)
def displacement(page, y, x):
    """Bilinear displacement at fractional (row, column) of a lattice page; three values, mm."""
    gy = min(max(y, 0.0), page.shape[0] - 1.001)
    gx = min(max(x, 0.0), page.shape[1] - 1.001)
    i, j = int(gy), int(gx)
    v, u = gy - i, gx - j
    w00, w01, w10, w11 = (1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u
    dx = w00 * page[i, j, 0] + w01 * page[i, j + 1, 0]
    dx += w10 * page[i + 1, j, 0] + w11 * page[i + 1, j + 1, 0]
    dy = w00 * page[i, j, 1] + w01 * page[i, j + 1, 1]
    dy += w10 * page[i + 1, j, 1] + w11 * page[i + 1, j + 1, 1]
    dz = w00 * page[i, j, 2] + w01 * page[i, j + 1, 2]
    dz += w10 * page[i + 1, j, 2] + w11 * page[i + 1, j + 1, 2]
    return dx, dy, dz


@njit(cache=True, nogil=True)
def lay_out_slice(out, place, k, space, radii, layers, texture):
    """Label one slice by the layers of the body and note where each voxel lies.

    out : (R, C) uint8; place : (5, R, C) float32, receives x, y, z (reference mm), the distance
    beyond the cavity's wall and the height above the diaphragm; 99 where that does not matter.
    space : frame (3, 4), lattice, lattice grid (x, y, z, step), profile (first z, step), dome (5,),
    largest displacement. The frame turns about z only: z is constant in a slice until it is bent.
    layers : (6,) uint8, the label of each layer of ``wall_layer``.
    """
    frame, lattice, grid, profile, dome, margin = space
    page = np.empty(lattice.shape[1:], np.float32)
    plane = frame[2, 2] * k + frame[2, 3]
    lattice_page(lattice, (plane - grid[2]) / grid[3], page)
    low = int((plane - margin - profile[0]) / profile[1])
    high = int((plane + margin - profile[0]) / profile[1]) + 2
    low, high = max(0, min(low, radii.shape[0] - 1)), max(1, min(high, radii.shape[0]))
    reach = 0.0
    for n in range(low, high):
        for a in range(radii.shape[1]):
            reach = max(reach, radii[n, a, 2])
    reach += 2 * margin
    domes = dome[3] - 25.0 < plane < dome[0] + 80.0
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            x = frame[0, 0] * j + frame[0, 1] * i + frame[0, 2] * k + frame[0, 3]
            y = frame[1, 0] * j + frame[1, 1] * i + frame[1, 2] * k + frame[1, 3]
            from_axis = y - AXIS_Y
            if plane < ARMS_FROM_Z and x * x + from_axis * from_axis > reach * reach:
                out[i, j] = layers[0]
                continue
            dx, dy, dz = displacement(page, (y - grid[1]) / grid[3], (x - grid[0]) / grid[3])
            x += dx
            y += dy
            z = plane + dz
            place[0, i, j], place[1, i, j], place[2, i, j] = x, y, z
            place[3, i, j] = place[4, i, j] = 99.0
            out[i, j] = layers[0]
            from_axis = y - AXIS_Y
            radius = np.sqrt(x * x + from_axis * from_axis)
            level = (z - profile[0]) / profile[1]
            bounds = polar_radii(radii, level, quick_angle(from_axis, x))
            if radius >= bounds[2]:
                continue
            ripples = (0.0, 0.0)
            if bounds[0] <= radius < bounds[1]:
                ripples = (
                    sample_texture(texture, x / 60.0, y / 60.0, z / 110.0),
                    sample_texture(texture, y / 34.0, x / 34.0, z / 60.0),
                )
            out[i, j] = layers[wall_layer(radius, bounds, ripples)]
            place[3, i, j] = radius - bounds[0]
            if domes and radius < bounds[0] + 4.0:
                place[4, i, j] = z - dome_height(x, y, radius / max(bounds[0], 1.0), dome)
            elif plane < dome[3]:
                place[4, i, j] = -99.0


@njit(cache=True, nogil=True)
def claim_voxels(here, place, s, shapes, group, texture):
    """Give the voxels of one slice that lie inside shape s, and may be replaced, its label.

    here : (R, C) uint8; place as in ``lay_out_slice``; the rest as in ``label_slices``.
    """
    heads, boxes, relief, rows = shapes
    first = heads[s, 2]
    fenced = first + heads[s, 3]
    last = fenced + heads[s, 4]
    height, size, offset = relief[s, 0], relief[s, 1], relief[s, 2]
    reach = RELIEF_REACH * height
    for i in range(boxes[s, 2], boxes[s, 3]):
        for j in range(boxes[s, 4], boxes[s, 5]):
            if not (heads[s, 1] >> group[here[i, j]]) & 1:
                continue
            x, y, z = place[0, i, j], place[1, i, j], place[2, i, j]
            beyond, above = place[3, i, j], place[4, i, j]
            d = -1e9
            for n in range(first, fenced):
                d = max(d, fence_distance(x, y, z, beyond, above, rows, n))
                if d > reach:
                    break
            if d <= reach and last > fenced:
                d = max(d, fold_solids(x, y, z, rows, fenced, last))
            if abs(d) < reach:
                u, v, w = x / size + offset, y / size + offset, z / size
                d += height * sample_texture(texture, u, v, w)
            if d < 0:
                here[i, j] = heads[s, 0]


@njit(cache=True, nogil=True)
def label_slices(out, first, space, radii, layers, shapes, group, texture, place):
    """Label slices ``first .. first + len(out)`` of a phantom.

    Parameters
    ----------
    out : (n_k, R, C) uint8
        Receives the labels.
    first : int
        Number of the first slice.
    space, layers
        See ``lay_out_slice``.
    radii : (n_levels, n_angles, 3) float32, mm
        Polar radii of the cavity, of the muscles and of the skin.
    shapes : tuple of arrays
        heads (n, 5) int32: label, groups that may be replaced (bits), first row, fences, solids;
        boxes (n, 6) int32: half-open voxel box k, i, j;
        relief (n, 3) float32: amplitude and size (mm) of the surface's relief, texture offset;
        rows (m, 18) float32.
    group : (256,) uint8
        Group of each label.
    texture : (N, N, N) float32
        Periodic noise of mean 0 and deviation 1.
    place : (5, R, C) float32
        Scratch.
    """
    heads, boxes = shapes[0], shapes[1]
    for n in range(out.shape[0]):
        k = first + n
        lay_out_slice(out[n], place, k, space, radii, layers, texture)
        for s in range(heads.shape[0]):
            if boxes[s, 0] <= k < boxes[s, 1]:
                claim_voxels(out[n], place, s, shapes, group, texture)


@njit(cache=True, nogil=True)
def outermost(tissue, wanted, axis, steps, out):
    """Largest distance from the body's axis of the wanted tissues, per slice and direction.

    tissue : (K, R, C) uint8; wanted : (256,) uint8, 1 = counts; axis : (K, 2) float64, row and
    column in mm; steps : (3,) mm; out : (K, n_angles) float32, 0 where there is none.
    """
    n_angles = out.shape[1]
    out[:] = 0
    for k in range(tissue.shape[0]):
        for i in range(tissue.shape[1]):
            y = i * steps[1] - axis[k, 0]
            for j in range(tissue.shape[2]):
                if wanted[tissue[k, i, j]] == 0:
                    continue
                x = j * steps[2] - axis[k, 1]
                radius = np.float32(np.sqrt(x * x + y * y))
                n = int(quick_angle(y, x) * n_angles + 0.5) % n_angles
                out[k, n] = max(out[k, n], radius)


@njit(cache=True, nogil=True)
def fill_body(tissue, axis, radii, layers, steps, texture):
    """Give unlabelled (0) voxels of a tissue map the layer of the body they lie in, in place.

    radii : (K, n_angles, 3) float32, mm: cavity, muscle, skin; layers : (6,) uint8, the tissue of
    each layer of ``wall_layer``; axis and steps as in ``outermost``.
    """
    for k in range(tissue.shape[0]):
        for i in range(tissue.shape[1]):
            y = i * steps[1] - axis[k, 0]
            for j in range(tissue.shape[2]):
                if tissue[k, i, j] != 0:
                    continue
                x = j * steps[2] - axis[k, 1]
                radius = np.sqrt(x * x + y * y)
                bounds = polar_radii(radii, k, quick_angle(y, x))
                if radius >= bounds[2]:
                    continue
                z = k * steps[0]
                ripples = (
                    sample_texture(texture, x / 60.0, y / 60.0, z / 110.0),
                    sample_texture(texture, y / 34.0, x / 34.0, z / 60.0),
                )
                tissue[k, i, j] = layers[wall_layer(radius, bounds, ripples)]


@njit(cache=True, nogil=True)
def fill_gaps(tissue, gap, between, filling):
    """Fill unlabelled runs of at most ``gap`` slices between two voxels of one tissue, in place.

    Between vertebral bodies, that is where the discs are.
    """
    for i in range(tissue.shape[1]):
        for j in range(tissue.shape[2]):
            last = -1
            for k in range(tissue.shape[0]):
                if tissue[k, i, j] == between:
                    if last >= 0 and 1 < k - last <= gap + 1:
                        for n in range(last + 1, k):
                            if tissue[n, i, j] == 0:
                                tissue[n, i, j] = filling
                    last = k
