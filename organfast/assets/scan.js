"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const about = JSON.parse($("about").textContent);
  const probe = document.createElement("canvas").getContext("webgl2");
  if (!probe) {
    $("viewer").hidden = true;
    $("no-webgl").hidden = false;
    $("pictures").classList.remove("print");
    return;
  }
  const bytes = (id) => {
    const packed = atob($(id).textContent);
    const out = new Uint8Array(packed.length);
    for (let n = 0; n < packed.length; n++) out[n] = packed.charCodeAt(n);
    return out.buffer;
  };
  const { Niivue, NVImage } = niivue;
  const nv = new Niivue({
    backColor: [0, 0, 0, 1],
    crosshairColor: [1, 0.69, 0, 0.75],
    crosshairGap: 6,
    fontColor: [1, 1, 1, 1],
    isRadiologicalConvention: true,
    showAllOrientationMarkers: true,
    dragAndDropEnabled: false,
    scrollRequiresFocus: true,
    multiplanarShowRender: 0,
    multiplanarPadPixels: 4,
    logLevel: "error",
  });
  const canvas = $("canvas");
  // NiiVue's own keys would hide views and clip planes; ours are said in the page.
  const moves = { ArrowUp: [0, 0, 1], ArrowDown: [0, 0, -1], PageUp: [0, 0, 5], PageDown: [0, 0, -5],
    ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0] };
  const fronts = { ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0] };
  for (const kind of ["keydown", "keyup"]) {
    canvas.parentElement.addEventListener(kind, (event) => {
      event.stopPropagation();
      const move = (event.shiftKey && fronts[event.key]) || moves[event.key];
      if (kind === "keydown" && move && nv.volumes.length) {
        event.preventDefault();
        nv.moveCrosshairInVox(...move);
      }
    }, true);
  }
  await nv.attachToCanvas(canvas);

  const names = {};
  for (const organ of about.organs) names[organ.label] = organ.title;
  const side = (mm, high, low) => `${mm >= 0 ? high : low} ${Math.abs(mm).toFixed(0)}`;
  nv.onLocationChange = (at) => {
    const [x, y, z] = at.mm;
    const label = Math.round(at.values[1] ? at.values[1].value : 0);
    const parts = [`${side(x, "R", "L")} · ${side(y, "A", "P")} · ${side(z, "S", "I")} mm`];
    if (about.has_image) parts.push(`${Math.round(at.values[0].value)} HU`);
    parts.push(names[label] || "no organ");
    if (map && at.values[2]) parts.push(`probability ${(at.values[2].value / 255).toFixed(2)}`);
    $("where").textContent = parts.join("   ");
  };

  let chosen = null;
  let map = null;
  const fill = () => {
    const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
    const alone = $("alone").checked;
    for (let label = 1; label < about.colours.length; label++) {
      const [red, green, blue] = about.colours[label];
      const dim = chosen && chosen.label !== label;
      // NiiVue takes a label's alpha as all or nothing, so the others are darkened.
      const light = dim ? 0.4 : 1;
      table.R.push(red * light); table.G.push(green * light); table.B.push(blue * light);
      table.I.push(label);
      table.A.push(!names[label] || (dim && alone) ? 0 : 255);
      table.labels.push(names[label] || "");
    }
    nv.volumes[1].setColormapLabel(table);
    nv.volumes[1].opacity = map ? 0 : Number($("opacity").value) / 100;
    if (map) map.opacity = Number($("opacity").value) / 100;
    nv.updateGLVolume();
  };
  const window_ = () => {
    const [low, high] = $("window").value.split(",").map(Number);
    nv.volumes[0].cal_min = low;
    nv.volumes[0].cal_max = high;
    nv.updateGLVolume();
  };
  const show = async () => {
    const wanted = chosen && chosen.map && $("probability").checked ? chosen : null;
    if (map && (!wanted || map.organ !== wanted)) {
      nv.removeVolume(map);
      map = null;
    }
    if (wanted && !map) {
      map = await NVImage.new(bytes(wanted.map), "map.nii.gz", "inferno", 0.6, null, 13, 255);
      map.organ = wanted;
      nv.addVolume(map);
    }
    $("scale").hidden = !map;
    const note = $("map-note");
    note.textContent = !chosen ? "" : !$("probability").checked ? "" : chosen.map ? "" :
      `No probability map of ${chosen.title} is stored: segment with --probabilities.`;
    fill();
    nv.createOnLocationChange();
  };

  const volumes = [
    await NVImage.new(bytes("image"), "image.nii.gz", "gray", 1),
    await NVImage.new(bytes("labels"), "labels.nii.gz", "gray", 0.5),
  ];
  for (const volume of volumes) nv.addVolume(volume);
  if (about.has_image) window_();
  else { nv.volumes[0].cal_min = 0; nv.volumes[0].cal_max = 1; }
  fill();
  const go = (mm) => {
    nv.scene.crosshairPos = nv.mm2frac(mm);
    nv.createOnLocationChange();
    nv.drawScene();
  };

  const buttons = [...$("list").querySelectorAll("button:not([disabled])")];
  const choose = (button, focus) => {
    const organ = about.organs.find((one) => String(one.label) === button.dataset.label) || null;
    chosen = organ;
    for (const other of buttons) {
      other.setAttribute("aria-checked", String(other === button));
      other.tabIndex = other === button ? 0 : -1;
    }
    if (focus) button.focus();
    if (organ) go(organ.centre);
    return show();
  };
  buttons.forEach((button, n) => {
    button.addEventListener("click", () => choose(button, false));
    button.addEventListener("keydown", (event) => {
      const steps = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };
      const last = buttons.length - 1;
      const to = event.key === "Home" ? 0 : event.key === "End" ? last :
        steps[event.key] ? (n + steps[event.key] + buttons.length) % buttons.length : null;
      if (to === null) return;
      event.preventDefault();
      choose(buttons[to], true);
    });
  });
  const views = [...document.querySelectorAll("[data-view]")];
  const view = (button) => {
    for (const other of views) other.setAttribute("aria-pressed", String(other === button));
    nv.setSliceType(Number(button.dataset.view));
  };
  for (const button of views) button.addEventListener("click", () => view(button));
  $("opacity").addEventListener("input", fill);
  $("alone").addEventListener("change", fill);
  $("probability").addEventListener("change", show);
  $("window").addEventListener("change", window_);

  // A phone shows one large view rather than three small ones.
  view(views.find((b) => b.dataset.view === (canvas.offsetWidth < 560 ? "0" : "3")));
  if (about.start) go(about.start);
  document.documentElement.dataset.ready = "true";
})().catch((error) => {
  document.getElementById("viewer").hidden = true;
  document.getElementById("no-webgl").hidden = false;
  document.getElementById("pictures").classList.remove("print");
  console.error(error);
});
