// The page of the API: openapi.json, shown. Addresses are relative, so it works behind a proxy's path too.

import { at, make } from "./dom.js";

const METHODS = ["get", "post", "patch", "put", "delete"];
const HERE = new URL(".", location.href).href.replace(/\/$/, "");

const code = (text) => make("code", {}, text);

/** An id that a link can name. */
const idOf = (...words) => words.join("-").replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "").toLowerCase();

/** The values that a schema allows, as text with links. */
function kind(schema) {
  if (schema.$ref) {
    const name = schema.$ref.split("/").at(-1);
    return [make("a", { href: `#${idOf("schema", name)}` }, name)];
  }
  const options = schema.anyOf ?? schema.oneOf;
  if (options) {
    const shown = options.filter((option) => option.type !== "null").map(kind);
    return shown.flatMap((words, index) => (index ? [" or ", ...words] : words));
  }
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(", ")];
  if (schema.prefixItems) return [`${schema.prefixItems.length} values`];
  if (schema.type === "array") return ["list of ", ...kind(schema.items ?? {})];
  if (schema.additionalProperties?.type || schema.additionalProperties?.$ref) {
    return ["mapping to ", ...kind(schema.additionalProperties)];
  }
  return [schema.format === "binary" ? "file" : (schema.type ?? "any"), ...range(schema)];
}

/** The bounds of a number, as text. */
function range(schema) {
  const least = schema.minimum ?? schema.exclusiveMinimum, most = schema.maximum ?? schema.exclusiveMaximum;
  const from = schema.exclusiveMinimum !== undefined ? "above" : "from";
  const words = [least !== undefined ? `${from} ${least}` : "", most !== undefined ? `to ${most}` : ""];
  return words.some(Boolean) ? [` ${words.filter(Boolean).join(" ")}`] : [];
}

function table(heads, rows) {
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, ...[cell].flat()))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

/** The fields of an object. */
function fields(schema) {
  const required = schema.required ?? [];
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => [
    code(name), kind(field), [required.includes(name) ? "" : "optional. ", field.description ?? ""].join(""),
  ]);
  return rows.length ? table(["field", "type", ""], rows) : make("p", {}, ...kind(schema));
}

/** A command that asks an endpoint. */
function curl(path, method, operation) {
  const query = (operation.parameters ?? []).some(({ name }) => name === "r") ? "?r=8" : "";
  const words = ["curl"];
  if (method !== "get" && method !== "post") words.push(`-X ${method.toUpperCase()}`);
  if (operation.security) words.push("-H 'Authorization: Bearer KEY'");
  const content = operation.requestBody?.content ?? {};
  const form = content["multipart/form-data"], json = content["application/json"];
  if (form) {
    words.push(`-F ${Object.keys(form.schema.properties)[0]}=@photo.jpg`);
  } else if (content["application/octet-stream"]) {
    words.push("-H 'content-type: image/jpeg' --data-binary @photo.jpg");
  } else if (json) {
    words.push("-H 'content-type: application/json'");
    words.push(`-d '${JSON.stringify(json.example ?? json.schema.example ?? {})}'`);
  }
  return [...words, `'${HERE}${path.replaceAll("{", "").replaceAll("}", "")}${query}'`].join(" ");
}

/** What may be sent: each content type with its schema. */
function body(content) {
  return Object.entries(content).map(([type, { schema }]) =>
    make("details", {}, make("summary", {}, code(type)), schema.$ref ? make("p", {}, ...kind(schema)) : fields(schema)),
  );
}

/** What comes back, the errors last. */
function answers(responses) {
  const rows = Object.entries(responses).map(([status, { description, content, headers }]) => {
    const [type, answer] = Object.entries(content ?? {})[0] ?? [];
    const named = Object.keys(headers ?? {}).flatMap((name) => [" ", code(name)]);
    const said = answer?.schema.$ref ? kind(answer.schema) : [type?.split(";")[0] ?? ""];
    return [status, said, [status === "200" ? "" : description, ...(named.length ? ["headers:", ...named] : [])]];
  });
  return rows.sort(([one], [other]) => one - other);
}

function endpoint(path, method, operation) {
  const id = idOf(method, path), parameters = operation.parameters ?? [];
  const title = make(
    "h2", {}, make("span", { class: `method ${method}` }, method.toUpperCase()), code(path),
    ...(operation.security ? [make("span", { class: "fine" }, "wants a key")] : []),
  );
  const parts = [title, make("p", {}, operation.description ?? operation.summary ?? "")];
  if (parameters.length) {
    const rows = parameters.map((each) => [
      code(each.name), kind(each.schema), each.in, each.description ?? each.schema.description ?? "",
    ]);
    parts.push(table(["parameter", "type", "in", ""], rows));
  }
  if (operation.requestBody) {
    const why = operation.requestBody.description;
    parts.push(make("h3", {}, "Body"), ...(why ? [make("p", {}, why)] : []), ...body(operation.requestBody.content));
  }
  parts.push(make("h3", {}, "Try it"), make("pre", { tabindex: "0" }, make("code", {}, curl(path, method, operation))));
  const summary = make("summary", {}, "Answers and errors");
  parts.push(make("details", {}, summary, table(["status", "body", ""], answers(operation.responses))));
  at("contents").append(make("li", {}, make(
    "a", { href: `#${id}` }, make("span", { class: `method ${method}` }, method.toUpperCase()), code(path),
    make("span", {}, (operation.description ?? "").split(/[.:;]/)[0]),
  )));
  return make("section", { id, class: "endpoint" }, ...parts);
}

function show(api) {
  at("version").textContent = `version ${api.info.version}`;
  at("description").textContent = api.info.description ?? "";
  const schemes = Object.values(api.components?.securitySchemes ?? {});
  at("keys").hidden = !schemes.length;
  at("keys").textContent = `Send the key in one of these headers: ${schemes.map((each) => each.description).join(" or ")}`;
  const known = Object.entries(api.paths).flatMap(([path, operations]) =>
    METHODS.filter((method) => operations[method]).map((method) => [path, method, operations[method]]),
  );
  for (const { name, description, "x-displayName": title } of [{}, ...(api.tags ?? [])]) {  // ours have no tag
    const members = known.filter(([, , operation]) => operation.tags?.[0] === name);
    if (name && members.length) {
      at("contents").append(make("li", { class: "fine" }, title));
      at("api").append(make("h2", { id: idOf("protocol", name) }, title), make("p", { class: "fine" }, description));
    }
    for (const member of members) at("api").append(endpoint(...member));
  }
  for (const [name, schema] of Object.entries(api.components?.schemas ?? {})) {
    const about = schema.description ? [make("p", { class: "fine" }, schema.description)] : [];
    const summary = make("summary", {}, code(name));
    at("schemas").append(make("details", { id: idOf("schema", name) }, summary, ...about, fields(schema)));
  }
}

/** Opens what a link points to. */
function reveal() {
  const target = location.hash && at(location.hash.slice(1));
  if (!target) return;
  if (target.tagName === "DETAILS") target.open = true;
  target.scrollIntoView();
}

try {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  show(await response.json());
  addEventListener("hashchange", reveal);
  reveal();
} catch (error) {
  at("problem").textContent = `The description of the API cannot be read: ${error.message}.`;
  at("problem").hidden = false;
}
