"""Slow, obvious twins of the kernels."""

from itertools import groupby, pairwise

import numpy as np

# --- enlargement ----------------------------------------------------------------------------------


def blend_slices(before, after, weight):
    return before + np.float32(weight) * (after - before)


def enlarge_map(probabilities, row_lower, row_weight, col_lower, col_weight):
    """One class, (rows, cols) float32, one voxel at a time, every step rounded to float32."""
    rows, cols = probabilities.shape
    out = np.empty((len(row_lower), len(col_lower)), np.float32)
    for y, (row, w_row) in enumerate(zip(row_lower, row_weight, strict=True)):
        below = min(row + 1, rows - 1)
        for x, (col, w_col) in enumerate(zip(col_lower, col_weight, strict=True)):
            beside = min(col + 1, cols - 1)
            p = probabilities
            left = p[row, col] + w_row * (p[below, col] - p[row, col])
            right = p[row, beside] + w_row * (p[below, beside] - p[row, beside])
            out[y, x] = left + w_col * (right - left)
    return out


def enlarge_labels(probabilities, row_lower, row_weight, col_lower, col_weight):
    """All classes to all voxels, then the first greatest."""
    classes = np.moveaxis(probabilities, -1, 0)
    full = np.stack([enlarge_map(p, row_lower, row_weight, col_lower, col_weight) for p in classes])
    return full.argmax(axis=0), full.max(axis=0)


def quantised(p):
    """0..1 as 0..255, half rounded up."""
    return np.floor(p * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def weigh_slice(probabilities, row_at, col_at):
    """(3, classes) sums of p^2, p^2 row, p^2 col."""
    sums = np.zeros((3, probabilities.shape[2]))
    for row, y in enumerate(row_at):
        for col, x in enumerate(col_at):
            squared = probabilities[row, col].astype(np.float64) ** 2
            sums += np.stack([squared, squared * y, squared * x])
    return sums


# --- label maps -----------------------------------------------------------------------------------


def label_statistics(labels, confidence, n_classes):
    """Counts, index sums, half-open boxes and confidence sums, one voxel at a time."""
    counts = np.zeros(n_classes, np.int64)
    sums = np.zeros((n_classes, 3), np.int64)
    boxes = np.zeros((n_classes, 3, 2), np.int64)
    confidence_sums = np.zeros(n_classes, np.int64)
    for index in np.ndindex(labels.shape):
        label = labels[index]
        for axis in range(3):
            start, stop = boxes[label, axis] if counts[label] else (index[axis], 0)
            boxes[label, axis] = min(start, index[axis]), max(stop, index[axis] + 1)
        counts[label] += 1
        sums[label] += index
        confidence_sums[label] += confidence[index]
    return counts, sums, boxes, confidence_sums


def encode_runs(planes, taken_for):
    """stops, labels and the first run of each row; last, the number of runs."""
    stops, labels, rows = [], [], [0]
    for row in taken_for[planes].reshape(-1, planes.shape[2]).tolist():
        stop = 0
        for label, run in groupby(row):
            stop += len(list(run))
            stops.append(stop)
            labels.append(label)
        rows.append(len(stops))
    return stops, labels, rows


def decoded(stops, rows, values, shape):
    """The value of each run at its voxels."""
    voxels = np.empty((shape[0] * shape[1], shape[2]), values.dtype)
    for row, (first, end) in zip(voxels, pairwise(rows), strict=True):
        for run in range(first, end):
            row[0 if run == first else stops[run - 1] : stops[run]] = values[run]
    return voxels.reshape(shape)


def join_runs(planes, sought, corners):
    """The piece of each run: components of each label's mask, numbered as runs meet them."""
    from scipy import ndimage

    near = np.ones((3, 3, 3)) if corners else None
    found = {label: ndimage.label(planes == label, near)[0] for label in np.flatnonzero(sought)}
    seen, pieces = [], []
    for at in np.ndindex(planes.shape):
        k, i, j = at
        if j > 0 and planes[at] == planes[k, i, j - 1]:
            continue
        label = planes[at]
        piece = (label, found[label][at]) if sought[label] else None
        if piece and piece not in seen:
            seen.append(piece)
        pieces.append(seen.index(piece) if piece else -1)
    return pieces


def piece_sizes(pieces, first, n):
    return [np.count_nonzero(pieces[first:] == piece) for piece in range(n)]


def piece_origins(planes, pieces, order, n):
    owners, places = np.zeros(n, int), [[] for _ in range(n)]
    for at in np.argwhere(pieces >= 0):
        piece = pieces[tuple(at)]
        owners[piece] = planes[tuple(at)]
        places[piece].append(order[0] + at @ order[1:])
    return owners, [min(p) for p in places]


def faces(shape, first):
    """Every pair of voxels that share a face, of which the later lies in plane ``first`` or on."""
    for at in np.ndindex(shape):
        for step in np.eye(3, dtype=int):
            before = tuple(at - step)
            if at[0] >= first and min(before) >= 0:
                yield at, before
                yield before, at


def surrounding_labels(planes, pieces, first, column_of_label, shape):
    votes = np.zeros(shape)
    for one, other in faces(planes.shape, first):
        column = column_of_label[planes[other]]
        if pieces[one] >= 0 and pieces[other] < 0 and column >= 0:
            votes[pieces[one], column] += 1
    return votes


def enclosing_labels(planes, pieces, ends, n):
    near = [[] for _ in range(n)]
    for one, other in faces(planes.shape, 0):
        if pieces[one] >= 0 and pieces[other] < 0:
            near[pieces[one]].append(planes[other])
    lowest = [min(labels, default=65_535) for labels in near]
    inner = np.zeros(planes.shape, bool)
    inner[ends[0] : len(planes) - ends[1], 1:-1, 1:-1] = True
    for piece in pieces[(pieces >= 0) & ~inner]:
        lowest[piece] = 0
    return lowest, [max(labels, default=0) for labels in near]


def rewrite_runs(planes, pieces, first, becomes):
    out = np.array(planes)
    for at in np.argwhere(pieces >= 0):
        label = becomes[pieces[tuple(at)]]
        if at[0] >= first and label >= 0:
            out[tuple(at)] = label
    return out


def join_pieces(pairs, n_pieces):
    """The lowest piece that each can be reached from."""
    parents = list(range(n_pieces))
    for _ in range(n_pieces):
        for one, other in pairs:
            parents[one] = parents[other] = min(parents[one], parents[other])
    return parents


def clean(labels, classes, keep, smallest, fill_holes):
    """Whole-volume masks and scipy, organ after organ; a cleaned copy."""
    from scipy import ndimage

    others = [label for label in range(len(classes)) if label not in classes.organs]
    inside = classes.context or 0
    others.sort(key=lambda label: (label != inside, label))
    cleaned = labels.copy()
    for organ in classes.organs if keep != "none" else ():
        components, n = ndimage.label(labels == organ, np.ones((3, 3, 3)))
        sizes = [np.count_nonzero(components == c) for c in range(1, n + 1)]
        for c in range(1, n + 1):
            is_largest = c - 1 == int(np.argmax(sizes))
            is_part = keep == "parts" and sizes[c - 1] >= 0.5 * max(sizes)
            if is_largest or is_part or (keep == "dust" and sizes[c - 1] >= smallest):
                continue
            mask = components == c
            votes = np.zeros(len(others))
            for axis, step in ((axis, step) for axis in range(3) for step in (-1, 1)):
                near = np.moveaxis(np.pad(mask, 1), axis, 0)
                near = np.moveaxis(np.roll(near, step, axis=0), 0, axis)[1:-1, 1:-1, 1:-1]
                votes += [np.count_nonzero(labels[near] == other) for other in others]
            cleaned[mask] = others[int(np.argmax(votes))]
    # One voxel of background around the map joins all that is open.
    voids, n = ndimage.label(np.pad(np.isin(cleaned, others), 1, constant_values=True))
    around = np.pad(cleaned, 1)
    for c in range(1, n + 1) if fill_holes else ():
        near = around[ndimage.binary_dilation(voids == c)]
        organs = set(near.tolist()) & set(classes.organs)
        if c != voids[0, 0, 0] and len(organs) == 1:
            cleaned[(voids == c)[1:-1, 1:-1, 1:-1]] = organs.pop()
    return cleaned


def overlap(truth, predicted, n_classes):
    """How often each pair of labels meets."""
    counts = np.zeros((n_classes, n_classes), np.int64)
    for t, p in zip(truth.ravel(), predicted.ravel(), strict=True):
        counts[t, p] += 1
    return counts


# --- blocks, levels, resampling -------------------------------------------------------------------


def gather_blocks(hu, centres, size, window):
    """(n, size, size) float32: voxel by voxel, -1024 beyond the sides of (K, R, C)."""
    out = np.empty((len(centres), size, size), np.float32)
    low, high = window or (0, 1)
    for n, (k, i, j) in enumerate(centres):
        for y in range(size):
            for x in range(size):
                row, col = i + y - size // 2, j + x - size // 2
                inside = 0 <= row < hu.shape[1] and 0 <= col < hu.shape[2]
                value = max(int(hu[k, row, col]), -1024) if inside else -1024
                value = (np.float32(value) - np.float32(low)) * np.float32(1 / (high - low))
                out[n, y, x] = value if window is None else min(max(value, 0), 1)
    return out


def gather_features(slab, offsets, positions):
    out = np.empty((len(positions), len(offsets)), np.float32)
    for p, (k, i, j) in enumerate(positions):
        for f, (level, dk, di, dj) in enumerate(offsets):
            out[p, f] = slab[level, k + dk, i + di, j + dj]
    return out


def through_table(hu, table, floor):
    """Each voxel through the table; at least the floor."""
    out = np.empty(hu.shape, np.int16)
    for at in np.ndindex(hu.shape):
        value = int(hu[at])
        out[at] = value if table is None else table[value + 32768]
        out[at] = max(out[at], floor)
    return out


def box_level(volume, width, depth, air, reach, slices):
    """Each box of a volume (K, R, C) summed for itself, in integers; half is rounded up."""
    n_k, rows, cols = volume.shape
    pk, pr, pc = reach
    k0, k1 = slices
    out = np.empty((k1 - k0 + 2 * pk, rows + 2 * pr, cols + 2 * pc), np.int16)
    n = depth * width * width
    for m, y, x in np.ndindex(out.shape):
        first = k0 - pk + m - depth // 2
        in_box = [volume[min(max(k, 0), n_k - 1)] for k in range(first, first + depth)]
        top, left = y - pr - width // 2, x - pc - width // 2
        chosen = slice(max(top, 0), max(top + width, 0)), slice(max(left, 0), max(left + width, 0))
        inside = [plane[chosen] for plane in in_box]
        total = sum(int(plane.sum(dtype=np.int64)) for plane in inside)
        total += air * (n - sum(plane.size for plane in inside))
        out[m, y, x] = (2 * total + n) // (2 * n)
    return out


def slice_resampled(values, down_step, along_step):
    """(R, C) float64: each output voxel is a weighted mean, by the definition of the triangle."""
    rows, cols = values.shape
    n_rows, n_cols = max(1, round(rows / down_step)), max(1, round(cols / along_step))
    return np.array(
        [
            [
                sum(
                    weight * other * values[min(max(y, 0), rows - 1), min(max(x, 0), cols - 1)]
                    for y, weight in triangle(p, down_step)
                    for x, other in triangle(q, along_step)
                )
                for q in range(n_cols)
            ]
            for p in range(n_rows)
        ]
    )


def slices_blended(slices, step):
    n = len(slices)
    return np.stack(
        [
            sum(weight * slices[min(max(k, 0), n - 1)] for k, weight in triangle(o, step))
            for o in range(max(1, round(n / step)))
        ]
    )


def triangle(output, step):
    """(input voxel, weight) of one output voxel; outer edges of both grids coincide."""
    centre, half = (output + 0.5) * step - 0.5, max(1.0, step)
    reached = range(int(np.floor(centre - half)) - 1, int(np.ceil(centre + half)) + 2)
    weights = [max(0.0, 1 - abs(v - centre) / half) for v in reached]
    return [(v, w / sum(weights)) for v, w in zip(reached, weights, strict=True)]


# --- forest ---------------------------------------------------------------------------------------


def leaf_code(nodes, root, slab, offsets, position):
    """From the root to a leaf, one comparison at a time."""
    here = root
    while nodes["left"][here] >= 0:
        level, dk, di, dj = offsets[nodes["feature"][here]]
        k, i, j = position
        right = slab[level, k + dk, i + di, j + dj] > nodes["threshold"][here]
        here = root + nodes["left"][here] + right
    return ~nodes["left"][here]


def walk_forest(nodes, tree_starts, leaf_table, slab, offsets, positions):
    """(n, classes) float64: the mean of the leaves' shares, summed tree after tree."""
    n_classes = leaf_table.shape[1]
    shares = np.concatenate([np.eye(n_classes), leaf_table])
    out = np.zeros((len(positions), n_classes))
    for root in tree_starts[:-1]:
        for p, position in enumerate(positions):
            out[p] += shares[leaf_code(nodes, root, slab, offsets, position)]
    return out / (len(tree_starts) - 1)


# --- painting -------------------------------------------------------------------------------------


def sample_texture(texture, x, y, z):
    """The eight corners around a point, the texture repeated for ever."""
    n = len(texture)
    at = np.array([z, y, x], np.float64) * n / 8
    low = np.floor(at).astype(int)
    part = at - low
    total = 0.0
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, part, 1 - part))
        total += weight * float(texture[tuple((low + corner) % n)])
    return total


def tissue_depth(tissue, steps):
    """Two sweeps over the volume; neighbours outside it do not count."""
    dk, di, dj, dd = steps
    shape = tissue.shape
    depth = np.full(shape, 255, int)
    depth[tissue == 0] = 0
    for back in (-1, 1):
        for voxel in list(np.ndindex(shape))[::-back]:
            if tissue[voxel] == 0:
                continue
            for way, step in (
                ((back, 0, 0), dk),
                ((0, back, 0), di),
                ((0, 0, back), dj),
                ((0, back, -1), dd),
                ((0, back, 1), dd),
            ):
                other = tuple(np.add(voxel, way))
                if not all(0 <= a < n for a, n in zip(other, shape, strict=True)):
                    continue
                along = depth[other] if tissue[other] == tissue[voxel] else 0
                depth[voxel] = min(depth[voxel], along + step)
    return depth.astype(np.uint8)


def lumen_ceiling(tissue, hollow, n_maps):
    ceiling = np.full((n_maps, tissue.shape[0], tissue.shape[2]), -1, np.int16)
    for n in range(n_maps):
        lumen = hollow[tissue] == n
        for k, j in np.ndindex(ceiling.shape[1:]):
            rows = np.flatnonzero(lumen[k, :, j])
            if rows.size:
                ceiling[n, k, j] = rows[-1]
    return ceiling


def paint_slice(tissue, depth, k, steps, table, hollow, levels, texture):
    """HU before blur and noise, a voxel at a time; the table's columns as the kernel has them."""
    core, patch, patch_mm, shell, shell_mm, inner, inner_mm = range(7)
    vessel, vessel_mm, width, deep, _gas, bubbles, fall = range(7, 14)
    out = np.full(tissue.shape, -1000.0)
    for i, j in np.argwhere(tissue > 0):
        row = table[tissue[i, j]].astype(np.float64)
        x, y, z = j * steps[2], i * steps[1], k * steps[0]
        d = depth[i, j] * 0.25 - 0.5 * min(steps[1], steps[2])
        n = hollow[tissue[i, j]]
        if d < row[shell_mm]:
            out[i, j] = row[shell]
            continue
        if n >= 0 and i > levels[n, j]:
            out[i, j] = -960
            continue
        if 0 < row[inner_mm] < d:
            out[i, j] = row[inner] + 15 * sample_texture(texture, x / 6, y / 6, z / 6)
            continue
        s = row[patch_mm]
        grain = sample_texture(texture, x / s, z / s, y / s)
        if row[patch] > 0 and 0 < row[bubbles] < grain:
            out[i, j] = -960
            continue
        out[i, j] = row[core] - row[fall] * y + row[patch] * grain
        s = row[vessel_mm]
        one = sample_texture(texture, y / s + 0.37, x / s, z / s)
        two = sample_texture(texture, z / s, y / s + 3.1, x / s + 1.7)
        full = row[width] * (min(1, d / row[deep]) if row[deep] > 0 else 1)
        if np.hypot(one, two) < full:
            out[i, j] = row[vessel]
    return out


def blur_rows(source, taps):
    n = len(taps) - 1
    padded = np.pad(source.astype(np.float64), ((n, n), (0, 0)), mode="edge")
    kernel = np.concatenate([taps[:0:-1], taps])
    return sum(w * padded[t : t + len(source)] for t, w in enumerate(kernel))


def finish_slice(base, k, noise, tiles, circle):
    sigma, streak, shifts, body = noise
    n = tiles.shape[1]
    out = np.empty(base.shape, np.int16)
    for i, j in np.ndindex(base.shape):
        values = [
            tiles[t, (i + shifts[k, 2 * t]) % n, (j + shifts[k, 2 * t + 1]) % n] for t in range(3)
        ]
        away = ((i - body[k, 0]) ** 2 + (j - body[k, 1]) ** 2) / body[k, 2] ** 2
        near = 1.12 - 0.42 * min(1, away)
        hu = base[i, j] + near * (
            sigma[k] * (values[0] + values[1]) / np.sqrt(2) + streak[k] * values[2]
        )
        middle = 0.5 * (np.array(base.shape) - 1)
        if circle > 0 and np.hypot(i - middle[0], j - middle[1]) > circle:
            hu = -1024
        out[i, j] = np.floor(np.clip(hu, -1024, 3071) + 0.5)
    return out


def paint_slices(maps, look, scanner):
    """All slices (without a couch): paint, blend with the neighbours, blur, noise."""
    tissue, depth, levels = maps
    table, hollow, texture = look
    steps, _couch, row_taps, column_taps, neighbour, noise, tiles, circle = scanner
    pages = [
        paint_slice(tissue[k], depth[k], k, steps, table, hollow, levels[:, k], texture)
        for k in range(len(tissue))
    ]
    out = []
    for k, page in enumerate(pages):
        before, after = pages[max(k - 1, 0)], pages[min(k + 1, len(pages) - 1)]
        blended = (1 - 2 * neighbour) * page + neighbour * (before + after)
        blurred = blur_rows(blur_rows(blended, row_taps).T, column_taps).T
        out.append(finish_slice(blurred, k, noise, tiles, circle))
    return np.array(out)


# --- phantom --------------------------------------------------------------------------------------


def polar_radii(radii, level, turn):
    """Linear along the levels (ends held) and around the circle, one table after the other."""
    n_levels, n_angles, _ = radii.shape
    closed = np.concatenate([radii, radii[:, :1]], axis=1).astype(np.float64)
    found = []
    for n in range(3):
        at_angle = [
            np.interp(turn * n_angles, np.arange(n_angles + 1), ring) for ring in closed[:, :, n]
        ]
        found.append(np.interp(level, np.arange(n_levels), at_angle))
    return tuple(found)


def solid_distance(x, y, z, row):
    """By the definitions: q is the size of the solid through the point, over its own size."""
    row = row.astype(np.float64)
    p = np.array([x, y, z]) - row[3:6]
    if row[0] == 3:
        p, span = p * row[12:15], row[6:9]
        t = np.clip(p @ span / (span @ span), 0, 1)
        return np.linalg.norm(p - t * span) - (row[9] + t * row[10])
    radii = 1 / row[15:18]
    own = row[6:15].reshape(3, 3) @ p / radii
    if row[0] == 2:
        side = (np.hypot(own[0], own[1]) - 1) * min(radii[:2])
        cap = (abs(own[2]) - 1) * radii[2]
        return max(side, cap) + (max(4 - abs(side - cap), 0) / 4) ** 2
    power = 2 if row[0] == 0 else 4
    q = (np.abs(own) ** power).sum() ** (1 / power)
    gradient = own ** (power - 1) / radii * q ** (1 - power)
    return (q - 1) / np.linalg.norm(gradient) if q > 1e-2 else -min(radii)


def fold_solids(x, y, z, rows):
    whole = solid_distance(x, y, z, rows[0])
    for row in rows[1:]:
        d, k = solid_distance(x, y, z, row), float(row[2])
        d = -d if row[1] == 1 else d
        h = max(k - abs(whole - d), 0) ** 2 / (4 * k)
        whole = min(whole, d) - h if row[1] == 0 else max(whole, d) + h
    return whole


def claim_voxels(here, place, s, shapes, group, texture):
    """Every voxel of the slice's box, every fence and solid, no short cut."""
    heads, boxes, relief, rows = shapes
    label, replaces, first, n_fences, n_solids = heads[s]
    fences = rows[first : first + n_fences].astype(np.float64)
    solids = rows[first + n_fences : first + n_fences + n_solids]
    height, size, offset = (float(value) for value in relief[s])
    out = here.copy()
    for i in range(boxes[s, 2], boxes[s, 3]):
        for j in range(boxes[s, 4], boxes[s, 5]):
            if not replaces & (1 << int(group[here[i, j]])):
                continue
            x, y, z, beyond, above = (float(value) for value in place[:, i, j])
            d = [fold_solids(x, y, z, solids)] if n_solids else []
            for fence in fences:
                if fence[0] == 4:
                    d.append(fence[3:6] @ [x, y, z] - fence[6])
                else:
                    d.append(fence[4] * (beyond if fence[0] == 5 else above) - fence[3])
            whole = max(d)
            if abs(whole) < 2.5 * height:
                at = x / size + offset, y / size + offset, z / size
                whole += height * sample_texture(texture, *at)
            if whole < 0:
                out[i, j] = label
    return out


def outermost(tissue, wanted, axis, steps, n_angles):
    out = np.zeros((len(tissue), n_angles), np.float32)
    for k, i, j in np.argwhere(wanted[tissue] > 0):
        y, x = i * steps[1] - axis[k, 0], j * steps[2] - axis[k, 1]
        n = int(np.arctan2(y, x) / (2 * np.pi) % 1 * n_angles + 0.5) % n_angles
        out[k, n] = max(out[k, n], np.hypot(x, y))
    return out


def fill_gaps(tissue, gap, between, filling):
    out = tissue.copy()
    for i, j in np.ndindex(tissue.shape[1:]):
        marks = np.flatnonzero(tissue[:, i, j] == between)
        for low, high in pairwise(marks):
            if high - low - 1 <= gap:
                run = out[low + 1 : high, i, j]
                run[run == 0] = filling
    return out


# --- coarse to fine -------------------------------------------------------------------------------


def refined_slabs(answers, inside, margin, disagreement):
    """Probabilities, and where it asked; ``answers`` (k, i, j, classes) is what each would give."""
    outside = np.eye(answers.shape[3], dtype=np.float32)[0]
    known = np.where(inside[..., None], answers, outside)
    out, asked = known.copy(), np.zeros(inside.shape, bool)
    for position in zip(*np.nonzero(inside), strict=True):
        before = [n - n % 2 for n in position]
        after = [n + n % 2 for n in position]
        ends = [
            (b, a if a < size else b)
            for b, a, size in zip(before, after, inside.shape, strict=True)
        ]
        mean = known[np.ix_(*ends)]
        labels = np.unique(mean.argmax(axis=3))
        for _ in range(3):  # along k, then i, then j, rounded to float32 each time
            mean = (mean[0] + mean[1]) * np.float32(0.5)
        second, best = np.sort(mean)[-2:]
        is_coarse = all(n % 2 == 0 for n in position)
        in_doubt = (disagreement and len(labels) > 1) or best - second < np.float32(margin)
        asked[position] = is_coarse or in_doubt
        out[position] = answers[position] if asked[position] else mean
    return out, asked


# --- augmentation ---------------------------------------------------------------------------------


def organ_histograms(hu, organs, hu_of, counts):
    for organ in range(1, len(counts)):
        for unit in hu[organs == organ]:
            n = int((hu_of[int(unit) + 32768] + 1024) // 4)
            counts[organ, min(n, counts.shape[1] - 1)] += 1


def in_units(hu, unit_of):
    return np.interp(max(hu, -1024), np.arange(-32768, 32768), unit_of)


def organ_change(hu, look):
    offset, contrast, middle = (float(value) for value in look)
    texture = np.interp(hu - middle, [-160, -80, 80, 160], [0, -80, 80, 0])
    return np.interp(hu, [-1000, -800], [0, 1]) * (offset + contrast * texture)


def recolour_slice(hu, organs, k, look, hu_of, unit_of):
    """Every voxel asks all 27 neighbours."""
    padded = np.pad(organs, 1, mode="edge")
    shares = [0.25, 0.5, 0.25]
    out = np.empty(hu.shape[1:], np.int16)
    for i, j in np.ndindex(out.shape):
        old = new = float(hu_of[int(hu[k, i, j]) + 32768])
        around = padded[k : k + 3, i : i + 3, j : j + 3]
        for (a, b, c), organ in np.ndenumerate(around):
            if organ:
                share = shares[a] * shares[b] * shares[c]
                new += share * organ_change(old, look[organ])
        out[i, j] = np.floor(in_units(new, unit_of) + 0.5)
    return out


def at_fraction(volume, place):
    """Trilinear value of an array (n_k, n_i, n_j, ...) at a fractional place inside it."""
    low = [min(int(p), n - 2) if n > 1 else 0 for p, n in zip(place, volume.shape, strict=False)]
    total = 0.0
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod([1 - abs(p - a - c) for p, a, c in zip(place, low, corner, strict=True)])
        if weight > 0:
            total = total + weight * volume[tuple(np.add(low, corner))]
    return total


def deform_slice(hu, labels, k, placement, lattice, pitch, air, unknown, shape):
    """One voxel after the other, in a scan with a frame of air around each slice."""
    framed = np.pad(hu.astype(float), ((0, 0), (2, 2), (2, 2)), constant_values=air)
    page, out_labels = np.empty(shape), np.empty(shape, labels.dtype)
    for i, j in np.ndindex(shape):
        p = placement @ [k, i, j, 1] + at_fraction(lattice.astype(float), pitch * [k, i, j])
        near = np.floor(p + 0.5).astype(int)
        inside = (near >= 0) & (near < hu.shape)
        out_labels[i, j] = 0 if inside[0] else unknown
        if inside.all():
            out_labels[i, j] = labels[tuple(near)]
        z = np.clip(p[0], 0, len(hu) - 1)
        y, x = (np.clip(p[n] + 2, 0, framed.shape[n] - 1) for n in (1, 2))
        page[i, j] = at_fraction(framed, (z, y, x))
    return page, out_labels


def random_normal(seed, n):
    """Sum of the quarters of splitmix64's number n, in Python's own integers."""
    whole = (1 << 64) - 1
    z = (seed + (n + 1) * 0x9E3779B97F4A7C15) & whole
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & whole
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & whole
    quarters = [((z ^ (z >> 31)) >> n) & 0xFFFF for n in (0, 16, 32, 48)]
    return (sum(quarters) - 2 * 65535) / np.sqrt(4 * (65536**2 - 1) / 12)


def finish_page(page, k, noise_hu, seed, hu_of, unit_of):
    out = np.empty(page.shape, np.int16)
    for n, (i, j) in enumerate(np.ndindex(page.shape), start=k * page.size):
        value = float(page[i, j])
        if noise_hu:
            hu = np.interp(value, np.arange(-32768, 32768), hu_of)
            value = in_units(hu + noise_hu * random_normal(seed, n), unit_of)
        out[i, j] = np.floor(value + 0.5)
    return out


# --- rates ----------------------------------------------------------------------------------------


def gathered(voxels, places):
    return sum(int(voxels[place]) for place in places)


def shifted(n):
    state = 88172645463325252
    for _ in range(n):
        state ^= (state << 13) % 2**64
        state ^= state >> 7
        state ^= (state << 17) % 2**64
    return state


def label_forest(nodes, tree_starts, leaf_table, slab, offsets, positions):
    """The greatest share after all trees, the lowest class of equal ones."""
    shares = walk_forest(nodes, tree_starts, leaf_table, slab, offsets, positions)
    return shares.argmax(axis=1)


def clear_labels(labels, kept):
    out = labels.copy()
    for at in np.ndindex(labels.shape):
        if not kept[labels[at]]:
            out[at] = 0
    return out


# --- the CNN --------------------------------------------------------------------------------------


def blocks_at(slab, offsets, positions):
    """(n, n_features), one voxel at a time."""
    return np.array(
        [
            [slab[level, k + dk, i + di, j + dj] for level, dk, di, dj in offsets]
            for k, i, j in positions
        ]
    )


def cnn_inputs(blocks, window, standardise=False):
    """Each block in the window as 0..1, and then perhaps at mean 0 and deviation 1."""
    low, high = window
    x = np.clip((blocks.astype(float) - low) / (high - low), 0, 1)
    if standardise:
        x = np.stack([(b - b.mean()) / max(b.std(), 1e-6) for b in x])
    return x


def cnn_logits(described, params, blocks):
    """Of blocks (n, L, slices, size, size), each layer one output at a time."""
    flat = []
    for t, layers in enumerate(described.towers):
        x = np.moveaxis(np.asarray(blocks, float)[:, t], 1, 3)
        for n, layer in enumerate(layers):
            if type(layer).__name__ == "MaxPool":
                x = _windows(x, layer.size, layer.size).max(axis=(3, 4))
                continue
            if layer.padding == "SAME":
                n_out = -(-x.shape[1] // layer.stride)
                zeros = max(0, (n_out - 1) * layer.stride + layer.size - x.shape[1])
                sides = (zeros // 2, zeros - zeros // 2)
                x = np.pad(x, ((0, 0), sides, sides, (0, 0)))
            kernel, bias = (params[f"tower{t}.conv{n}.{name}"] for name in ("kernel", "bias"))
            seen = _windows(x, layer.size, layer.stride)
            x = np.maximum(np.tensordot(seen, np.asarray(kernel, float), 3) + bias, 0)
        flat.append(x.reshape(len(x), -1))
    x = np.concatenate(flat, axis=1)
    for n in range(len(described.head) + 1):
        layer = described.head[n] if n < len(described.head) else None
        if type(layer).__name__ == "Dropout":
            continue
        x = x @ np.asarray(params[f"dense{n}.kernel"], float) + params[f"dense{n}.bias"]
        x = np.maximum(x, 0) if layer is not None and layer.relu else x
    return x


def _windows(x, size, stride):
    """(n, rows, cols, size, size, channels) of (n, r, c, channels)."""
    starts = range(0, x.shape[1] - size + 1, stride)
    rows = [np.stack([x[:, i : i + size, j : j + size] for j in starts], axis=1) for i in starts]
    return np.stack(rows, axis=1)


def cnn_probabilities(described, params, inputs, merge, n_classes):
    """Softmax of the logits, summed over the labels of each class."""
    z = cnn_logits(described, params, inputs)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.stack([p[:, np.asarray(merge) == c].sum(axis=1) for c in range(n_classes)], axis=1)


# --- evaluation -----------------------------------------------------------------------------------


def pair_statistics(truth, predicted, n_classes):
    """Confusion, and of both maps index sums and half-open boxes, one voxel at a time."""
    counts = overlap(truth, predicted, n_classes)
    nothing = np.zeros(truth.shape, np.uint8)
    both = [label_statistics(labels, nothing, n_classes) for labels in (truth, predicted)]
    return counts, np.stack([s[1] for s in both]), np.stack([s[2] for s in both])


def confidence_counts(truth, predicted, confidence, judged):
    """By confidence, voxels predicted to be one of the judged labels, and those that are right."""
    counts = np.zeros((2, 256), np.int64)
    for t, p, c in zip(truth.ravel(), predicted.ravel(), confidence.ravel(), strict=True):
        if judged[p]:
            counts[0, c] += 1
            counts[1, c] += t == p
    return counts


def corner_codes(inside):
    """Which of the eight voxels around each corner are inside; beyond the map nothing is."""
    padded = np.pad(inside, 1).astype(int)
    codes = np.zeros([n + 1 for n in inside.shape], np.uint8)
    for k, i, j in np.ndindex(codes.shape):
        around = padded[k : k + 2, i : i + 2, j : j + 2].ravel()
        codes[k, i, j] = sum(bit << n for n, bit in enumerate(around))
    return codes


def surface_points(codes, spacing):
    """(n, 3) mm, in the order of memory."""
    return np.argwhere((codes > 0) & (codes < 255)) * np.asarray(spacing, float)


def squared_in_planes(codes, step_i, step_j):
    """Squared distance to the nearest point of the surface in the same plane; inf without one."""
    squared = np.full(codes.shape, np.inf)
    for k, plane in enumerate(codes):
        points = np.argwhere((plane > 0) & (plane < 255)) * [step_i, step_j]
        for place in np.ndindex(plane.shape):
            away = points - np.array(place) * [step_i, step_j]
            squared[k][place] = min((away**2).sum(axis=1), default=np.inf)
    return squared


def gaps_to(points, others):
    """Distance of each point to the nearest of the others, all pairs looked at."""
    return np.array([np.sqrt(((others - point) ** 2).sum(axis=1)).min() for point in points])


def weighted_percentile(gaps, weights, share):
    """The smallest gap at which the gaps no greater have this share of the weight."""
    order = np.argsort(gaps, kind="stable")
    reached = np.cumsum(weights[order].astype(float))
    return gaps[order][np.argmax(reached >= share * reached[-1])]


def mixed(state):
    """SplitMix64's output, in Python's own numbers."""
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def bootstrap_means(values, seed, first, n_resamples):
    """Means of rows drawn with replacement, NaN left out."""
    step = 0x9E3779B97F4A7C15
    means = np.full((n_resamples, values.shape[1]), np.nan)
    for r in range(n_resamples):
        state = mixed((mixed(seed) + step * (first + r + 1)) % 2**64)
        rows = []
        for _ in range(len(values)):
            state = (state + step) % 2**64
            rows.append((mixed(state) >> 32) * len(values) >> 32)
        for column, drawn in enumerate(values[rows].T):
            if not np.isnan(drawn).all():
                means[r, column] = np.nanmean(drawn)
    return means
