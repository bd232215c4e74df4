// Paints a photo by merged groups, like tome_core/visualize.py: a group gets its mean colour and a line around it, and
// a single patch keeps its detail.

const LINE = 2; // pixels of the canvas

/** The part of an upright photo that the model sees, in the photo's pixels. */
export function crop(width, height, { seen, grid, patch }) {
  const [inputHeight, inputWidth] = seen.input_size;
  let across = width / seen.resize_size[1], down = height / seen.resize_size[0];
  if (seen.crop_mode === "center") across = down = Math.min(width, height) / seen.resize_size[0];
  return {
    left: (width - inputWidth * across) / 2,
    top: (height - inputHeight * down) / 2,
    width: grid[1] * patch * across, // less a rim that fills no patch, which the model ignores
    height: grid[0] * patch * down,
  };
}

/** Paints one photo on one canvas. */
export class Painter {
  #context;
  #canvas;
  #plain = null; // the photo as the canvas shows it, and each patch's colour in it
  #madeOf = [];

  constructor(canvas) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d", { willReadFrequently: true });
  }

  /**
   * Paints the groups after a block; without groups, the photo.
   * @param bitmap The upright photo, or null where the browser cannot read it.
   * @param merging The answer of /v1/explain.
   * @param groups For each patch the first patch of its group, or null.
   * @param lit A patch whose group stands out, or null.
   */
  paint(bitmap, merging, groups, lit = null) {
    const [rows, columns] = merging.grid;
    const cell = this.#fit(bitmap, merging);
    const context = this.#context;
    context.putImageData(this.#plain.pixels, 0, 0);
    if (!groups) return;
    const colours = this.#means(groups);
    const size = new Uint16Array(groups.length);
    for (const group of groups) size[group] += 1;
    for (let patch = 0; patch < groups.length; patch++) {
      const group = groups[patch];
      const x = (patch % columns) * cell, y = Math.floor(patch / columns) * cell;
      if (size[group] < 2) {
        context.fillStyle = "rgb(255 255 255 / .3)"; // a thin line between single patches
        this.#edges(patch, groups, rows, columns, cell, 1);
        continue;
      }
      context.fillStyle = `rgb(${colours[3 * group]} ${colours[3 * group + 1]} ${colours[3 * group + 2]})`;
      context.fillRect(x, y, cell, cell);
      context.fillStyle = line(group, columns);
      this.#edges(patch, groups, rows, columns, cell, LINE);
    }
    if (lit !== null) this.#light(groups, groups[lit], rows, columns, cell);
  }

  #edges(patch, groups, rows, columns, cell, wide) {
    const column = patch % columns, row = Math.floor(patch / columns);
    const x = column * cell, y = row * cell, group = groups[patch], context = this.#context;
    if (row > 0 && groups[patch - columns] !== group) context.fillRect(x, y, cell, wide);
    if (row < rows - 1 && groups[patch + columns] !== group) context.fillRect(x, y + cell - wide, cell, wide);
    if (column > 0 && groups[patch - 1] !== group) context.fillRect(x, y, wide, cell);
    if (column < columns - 1 && groups[patch + 1] !== group) context.fillRect(x + cell - wide, y, wide, cell);
  }

  #light(groups, group, rows, columns, cell) {
    groups.forEach((own, patch) => {
      this.#context.fillStyle = own === group ? "#fff" : "rgb(0 0 0 / .5)";
      if (own === group) this.#edges(patch, groups, rows, columns, cell, 2 * LINE);
      else this.#context.fillRect((patch % columns) * cell, Math.floor(patch / columns) * cell, cell, cell);
    });
  }

  /** Draws the part that the model sees, once for a photo; gives the side of a patch on the canvas. */
  #fit(bitmap, merging) {
    const [rows, columns] = merging.grid;
    const cell = Math.ceil(640 / columns);
    const madeOf = [bitmap, merging.model];
    if (this.#plain && madeOf.every((part, index) => part === this.#madeOf[index])) return cell;
    this.#canvas.width = columns * cell;
    this.#canvas.height = rows * cell;
    const context = this.#context, { width, height } = this.#canvas;
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#8a8f96";
    context.fillRect(0, 0, width, height);
    if (bitmap) {
      const part = crop(bitmap.width, bitmap.height, merging);
      context.drawImage(bitmap, part.left, part.top, part.width, part.height, 0, 0, width, height);
    }
    const pixels = context.getImageData(0, 0, width, height);
    this.#plain = { pixels, sums: sums(pixels.data, rows, columns, cell), area: cell * cell };
    this.#madeOf = madeOf;
    return cell;
  }

  #means(groups) {
    const { sums: own, area } = this.#plain;
    const colours = new Float64Array(own.length), count = new Uint16Array(groups.length);
    groups.forEach((group, patch) => {
      count[group] += 1;
      for (let channel = 0; channel < 3; channel++) colours[3 * group + channel] += own[3 * patch + channel];
    });
    return colours.map((sum, index) => Math.round(sum / (area * (count[Math.floor(index / 3)] || 1))));
  }
}

/** Sums of red, green and blue over each patch. */
function sums(data, rows, columns, cell) {
  const total = new Float64Array(3 * rows * columns), width = columns * cell;
  for (let y = 0; y < rows * cell; y++) {
    const first = Math.floor(y / cell) * columns;
    for (let x = 0; x < width; x++) {
      const at = 4 * (y * width + x), to = 3 * (first + Math.floor(x / cell));
      total[to] += data[at];
      total[to + 1] += data[at + 1];
      total[to + 2] += data[at + 2];
    }
  }
  return total;
}

/** A bright colour for each first patch, with a hue far from those of its neighbours. */
function line(patch, columns) {
  const hue = Math.floor(patch / columns) * 0.56984 + (patch % columns) * 0.754878;
  const [red, green, blue] = [0, 2 / 3, 1 / 3].map((offset) => {
    const along = (hue + offset) % 1;
    return Math.round(255 * (0.2 + 0.8 * Math.min(Math.max(6 * Math.abs(along - 0.5) - 1, 0), 1)));
  });
  return `rgb(${red} ${green} ${blue})`;
}
