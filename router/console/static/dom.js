// Making and keeping elements. Data goes into the page as text only, never as markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; strings among these become text. */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Writes only what differs, so that a selection and the focus stay where they are. */
export function setText(node, text) {
  if (node.textContent !== text) {
    node.textContent = text;
  }
}

/**
 * Makes the children of `container` those of `items`, in order: an item keeps its element for as long as it is there.
 * `update` writes an item into an element that `make` made.
 */
export function keyed(container, items, keyOf, make, update) {
  const before = new Map([...container.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, place) => {
    const key = keyOf(item);
    const child = before.get(key) ?? make(item);
    before.delete(key);
    child.dataset.key = key;
    if (container.children[place] !== child) {
      container.insertBefore(child, container.children[place] ?? null);
    }
    update(child, item);
  });
  for (const gone of before.values()) {
    gone.remove();
  }
}
